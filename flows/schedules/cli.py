"""`diffusion schedule`: what runs by itself, and when."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows import options as o
from flows.options import print_json
from flows.server import prepared

schedule_app = typer.Typer(help="What runs by itself, and when: add, list, pause, resume, remove.")

Name = Annotated[str, typer.Argument(help="Name of the schedule.")]


@schedule_app.command()
def add(
    name: Annotated[str | None, typer.Argument(help="Name of the schedule; default: the file's.")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", help="YAML file, or a schedule of the package, as digits-nightly.", metavar="FILE"
        ),
    ] = None,
    what: Annotated[str | None, typer.Option("--what", help="pipeline, generate, watch or prune.")] = None,
    preset: o.Preset = None,
    settings: o.Settings = None,
    source: Annotated[str | None, typer.Option("--source", help="Folder, file or s3:// URI of the images.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Of generate: the model; default: the champion.")] = None,
    cron: Annotated[str | None, typer.Option("--cron", help="When, as '0 2 * * *'.")] = None,
    interval: Annotated[str | None, typer.Option("--interval", help="How often, as 20s, 15m or 24h.")] = None,
    time_zone: Annotated[str | None, typer.Option("--time-zone", help="IANA name, as Europe/Berlin.")] = None,
    if_running: Annotated[
        str | None, typer.Option("--if-running", help="When the last run is still going: skip, queue or cancel.")
    ] = None,
    new_images: Annotated[
        bool | None, typer.Option("--new-images/--same-images", help="Each run makes new images.", show_default=False)
    ] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Put a schedule on the Prefect server, in place of one of the same name."""
    from diffusion_core.stages.settings import split_setting
    from flows.schedules.config import load_schedule

    fields = dict(split_setting(text) for text in settings or ())
    if source is not None:
        fields["source.uri"] = source
    given = {
        "name": name, "what": what, "preset": preset, "overrides": fields, "model": model, "cron": cron,
        "interval": interval, "time_zone": time_zone, "if_running": if_running, "new_images": new_images,
    }  # fmt: skip
    config, place = load_schedule(file, given), prepared(store)
    from flows.schedules import server

    _show(server.add(config, place), as_json)


@schedule_app.command(name="list")
def list_schedules(store: o.Store = None, as_json: o.Json = False) -> None:
    """List the schedules with their next times."""
    prepared(store)
    from flows.cli_store import aligned_rows
    from flows.schedules import server

    rows = server.rows()
    if as_json:
        print_json(rows)
        return
    shown = [{name: value for name, value in row.items() if name != "parameters"} for row in rows]
    typer.echo(aligned_rows(shown) or "no schedules")


@schedule_app.command()
def pause(name: Name, store: o.Store = None, as_json: o.Json = False) -> None:
    """Have a schedule start nothing until it is resumed."""
    prepared(store)
    from flows.schedules import server

    _show(server.set_active(name, False), as_json)


@schedule_app.command()
def resume(name: Name, store: o.Store = None, as_json: o.Json = False) -> None:
    """Have a paused schedule start again at its times."""
    prepared(store)
    from flows.schedules import server

    _show(server.set_active(name, True), as_json)


@schedule_app.command()
def remove(name: Name, store: o.Store = None, as_json: o.Json = False) -> None:
    """Take a schedule off the server; what it has made stays."""
    prepared(store)
    from flows.schedules import server

    _show(server.remove(name), as_json, "removed")


def _show(row: dict[str, Any], as_json: bool, news: str = "") -> None:
    if as_json:
        print_json(row)
        return
    state = news or ("active" if row["active"] else "paused")
    upcoming = f", next {row['next']}" if row["next"] else ""
    typer.echo(f"{row['name']}: {row['what']} {row['times']} {row['time_zone']}, {state}{upcoming}")
