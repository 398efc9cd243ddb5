"""How results are told, for terminals and for Prefect alike, and what is worth typing next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_core.stages.base import Rows
from diffusion_core.stages.pipeline import PipelineResult


def aligned(rows: Rows) -> str:
    """Rows as text in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def markdown(title: str, *parts: str | None) -> str:
    """A report of parts that are Markdown already; those that are empty are left out."""
    return "\n\n".join(part for part in (f"## {title}", *parts) if part)


def section(title: str, content: str | None) -> str:
    """A part of a report with its heading; nothing without content."""
    return f"### {title}\n\n{content}" if content else ""


def table(rows: Rows) -> str:
    """Rows as a table in Markdown; nothing without rows."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def columns(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table in Markdown whose columns have names; what a row does not have is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, ["---"] * len(names), *([_cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) if rows else ""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def next_commands(result: PipelineResult, typed: Mapping[str, Any]) -> list[str]:
    """The three commands worth typing after a pipeline; the training continues its run.

    Args:
        result: what the pipeline answered.
        typed: the options it was given, by name; None or absent: not given.
    """
    chosen = {name: typed.get(name) for name in ("preset", "config", "name", "workers", "backend")}
    chosen["set"] = typed.get("settings")
    start = {name: typed.get(name) for name in ("batch_size", "init_from")}
    store, dataset = result.store, result.dataset.uri
    longer = 2 * result.run.images_seen
    return [
        _command("lineage", result.images.uri, store=store),
        _command("generate", **chosen, store=store, model=result.version.reference, count=10_000),
        _command("train", **chosen, **start, store=store, dataset=dataset, images=longer, time_budget="20m"),
    ]


def _command(verb: str, *arguments: str, **options: Any) -> str:
    """A line for the shell; options that are None are left out, and lists give one option an entry."""
    words = ["diffusion", verb, *arguments]
    for name, value in options.items():
        for entry in value if isinstance(value, tuple) else [value]:
            if entry is not None:
                words += [f"--{name.replace('_', '-')}", str(entry)]
    return shlex.join(words)
