"""The verbs that say what follows by itself, and that answer what a run asks a person."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from flows import options as o
from flows import server
from flows.options import print_json

automation_app = typer.Typer(help="What may follow from an event by itself: off until it is enabled.")

Name = Annotated[str, typer.Argument(help="Name of the automation, as `diffusion automation list` shows it.")]


def add_to(app: typer.Typer) -> None:
    """Give the command its verbs."""
    app.add_typer(automation_app, name="automation")
    app.command()(approve)


def approve(
    question: Annotated[str, typer.Argument(help="Model version, as digits/3, or id of the flow run that waits.")],
    accept: Annotated[bool, typer.Option("--accept/--refuse", help="Whether it becomes the champion.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the registry.")],
    by: Annotated[str | None, typer.Option("--by", help="Who says so; default: the user of this shell.")] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Answer what a gate with `approval: ask` wants to know of a person."""
    from diffusion_core.tracking import approval

    place = server.place(store)
    asked = approval.open_question(place, question)
    answer = approval.answer(place, asked, accept, by or _user(), reason)
    if as_json:
        print_json({"model": asked.model, "version": asked.version, **answer.model_dump(mode="json")})
        return
    typer.echo(f"{asked.reference}: {answer.sentence}")
    typer.echo("A run that waits goes on within seconds; where none does, the same command again finds the answer.")


@automation_app.command(name="list")
def list_all(store: o.Store = None, as_json: o.Json = False) -> None:
    """List the automations, and whether the Prefect server has them enabled."""
    server.prepared(store)
    from flows import automations

    states = automations.states()
    if as_json:
        print_json(states)
        return
    for shipped in automations.SHIPPED:
        word = {True: "enabled", False: "disabled", None: "off"}[states[shipped.name]]
        typer.echo(f"{shipped.name:<18}  {word:<8}  {shipped.description}")


@automation_app.command()
def enable(
    name: Name,
    webhook_env: Annotated[
        str, typer.Option("--webhook-env", help="Environment variable with the address of the webhook, a secret.")
    ] = "DIFFUSION_WEBHOOK_URL",
    preset: Annotated[
        str | None, typer.Option("--preset", help="Preset that its runs start from where the event names none.")
    ] = None,
    settings: o.Settings = None,
    store: o.Store = None,
) -> None:
    """Enable an automation, and bring it up to date."""
    server.prepared(store)
    from flows import automations

    automations.enable(name, webhook_env, preset, settings or ())
    typer.echo(f"{name} is enabled")


@automation_app.command()
def disable(name: Name, store: o.Store = None) -> None:
    """Disable an automation."""
    server.prepared(store)
    from flows import automations

    automations.disable(name)
    typer.echo(f"{name} is disabled")


def _user() -> str:
    """Of this shell."""
    from diffusion_core.config import UserError

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container, without an entry in passwd
        raise UserError("--by: say who answers; this machine has no name for the user of this shell.") from None
