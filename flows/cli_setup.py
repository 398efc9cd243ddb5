"""The verbs that show configurations and run the local stack."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from flows import options as o
from flows.options import DEFAULT_STORE, print_json

if TYPE_CHECKING:
    from flows.stack import Service

config_app = typer.Typer(help="Show a configuration, or what a configuration may hold.")
stack_app = typer.Typer(help="A Prefect server, an MLflow server and the deployments, on this machine.")


def add_to(app: typer.Typer) -> None:
    """Give the command its groups of verbs."""
    app.add_typer(config_app, name="config")
    app.add_typer(stack_app, name="stack")


@config_app.command()
def show(
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    as_json: o.Json = False,
) -> None:
    """Print a whole configuration with all its defaults, ready to be saved as a file for --config."""
    import yaml

    from diffusion_core.stages.settings import as_values, load_config

    values = as_values(load_config(preset, config_file, settings or ()))
    if as_json:
        print_json(values)
    else:
        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration: every field with its description, bounds and default."""
    from diffusion_core.stages.config import PipelineConfig

    typer.echo(json.dumps(PipelineConfig.model_json_schema(), indent=2, ensure_ascii=False))


@stack_app.command()
def up(
    store: o.Store = None,
    prefect_port: Annotated[int, typer.Option("--prefect-port", help="Port of Prefect.", min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", help="Port of MLflow.", min=1, max=65535)] = 5000,
    as_json: o.Json = False,
) -> None:
    """Start the stack (what runs already is left alone) and print its addresses."""
    from diffusion_core.stages.checks import check_store
    from flows import stack

    check_store(store or DEFAULT_STORE)
    started = time.monotonic()
    services = stack.up(store or DEFAULT_STORE, prefect_port, mlflow_port)
    _show(services, as_json, f"up after {time.monotonic() - started:.0f} s")


@stack_app.command()
def down(store: o.Store = None, as_json: o.Json = False) -> None:
    """End the stack."""
    from flows import stack

    ended = stack.down(store or DEFAULT_STORE)
    _show(ended, as_json, "ended" if ended else "nothing was running")


@stack_app.command()
def status(store: o.Store = None, as_json: o.Json = False) -> None:
    """Say what of the stack is running."""
    from flows import stack

    services = stack.status(store or DEFAULT_STORE)
    _show(services, as_json, "" if services else "the stack is down")


def _show(services: list[Service], as_json: bool, news: str) -> None:
    from dataclasses import asdict

    if as_json:
        print_json([{**asdict(service), "alive": service.alive} for service in services])
        return
    for service in services:
        state = "running" if service.alive else "ended"
        typer.echo(f"{service.name:<12} {service.url or '-':<24} {state}, pid {service.pid}, log {service.log}")
    if news:
        typer.echo(news)
