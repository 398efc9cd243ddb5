"""The `diffusion` command. Nothing heavy is imported before a verb needs it: `--help` answers at once."""

from __future__ import annotations

import sys

import typer

from flows import cli_automation, cli_setup, cli_store
from flows.schedules.cli import schedule_app
from flows.verbs import Verbs

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    cls=Verbs,
    help="Train diffusion models on your own images and generate image sets in bulk.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _without_a_verb(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Exit status: 0, 1 if the work failed, 2 for a mistake of the user, told in one sentence."""
    try:
        status = int(app(args=arguments, standalone_mode=False) or 0)
    except Exception as error:
        return _told(error)
    if status == EXIT_INTERRUPTED:  # what typer makes of a Ctrl-C
        print("Interrupted; the same command continues the work.", file=sys.stderr)
    return status


def _told(error: Exception) -> int:
    from diffusion_core.config import UserError
    from diffusion_core.jobs.transport import JobFailed
    from diffusion_core.store.patience import StoreUnavailable

    if isinstance(error, UserError | JobFailed | StoreUnavailable):
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    if callable(
        say := getattr(error, "format_message", None)
    ):  # an option that does not exist, a value that is missing
        print(f"{' '.join(say().split()).rstrip('.')}; see diffusion --help.", file=sys.stderr)
        return EXIT_USER_ERROR
    raise error


cli_store.add_to(app)
cli_setup.add_to(app)
app.add_typer(schedule_app, name="schedule")
cli_automation.add_to(app)

if __name__ == "__main__":
    sys.exit(main())
