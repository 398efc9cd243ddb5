"""What several verbs of the command share: options, and how results are printed as JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

DEFAULT_STORE = "store"

Store = Annotated[
    str | None,
    typer.Option("--store", envvar="DIFFUSION_STORE", help="Root of the store: a folder or s3://bucket/prefix."),
]
Preset = Annotated[str | None, typer.Option("--preset", "-p", help="Start from a preset: digits, fashion-mnist, …")]
ConfigFile = Annotated[str | None, typer.Option("--config", "-c", help="Start from a YAML file.", metavar="FILE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override any field, as training.batch_size=256.", metavar="FIELD=VALUE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
