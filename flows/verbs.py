"""The verbs that run stages, made from their registry: an option for each field of what can be typed.

Nothing of a stage is imported before its verb is called: the list of verbs needs the registry alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from diffusion_core.stages.registry import STAGES, Entry
from flows import server
from flows.options import Json, print_json

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from diffusion_core.config import Config
    from diffusion_core.stages.base import Rows
    from diffusion_core.stages.options import Options

Run = Callable[..., None]
Command = Any  # of click, of which typer has a copy of its own that it does not show


class Verbs(TyperGroup):
    """The verbs of the command, with those of the stages, of `pipeline`, `plan` and `demo` among them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        made = {
            "demo": _Lazy("demo", "Run the whole pipeline on real handwritten digits, in minutes.", _demo),
            "pipeline": _Lazy(
                "pipeline",
                "Images to dataset version to trained, evaluated and registered model to generated images.",
                _pipeline,
            ),
            "plan": _Lazy(
                "plan", "Say what a pipeline would do, and what that would take, before anything starts.", _plan
            ),
            **{entry.verb: _of_stage(entry) for entry in STAGES.values()},
        }
        self.commands = {**made, **self.commands}


class _Lazy(TyperCommand):
    """A verb that is made when it is called; until then its name and its summary are enough."""

    def __init__(self, name: str, summary: str, make: Callable[[str, str], Command]) -> None:
        super().__init__(name, help=summary)
        self._make, self._summary = make, summary

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self._make(str(self.name), self._summary).make_context(info_name, args, parent, **extra)


def _of_stage(entry: Entry) -> _Lazy:
    def make(name: str, summary: str) -> Command:
        stage = entry.load()

        def run(as_json: bool, **given: Any) -> None:
            options, config = _understood(stage.options, given)
            request, backend = options.request(config), config.backend
            if stage.is_job:
                from flows.runner import run_flow

                result = run_flow(stage.name, lambda: stage.check(request, backend), request, backend)
            else:
                stage.check(request, backend)
                result = stage.run(request)
                if stage.events:
                    server.tell(stage.events(request, result), request.store)
            if stage.text and not as_json:
                typer.echo(f"{stage.text(result)}\n")
            _show(result, stage.rows(result), as_json)

        return _command(name, summary, stage.options, run)

    return _Lazy(entry.verb, entry.summary, make)


def _pipeline(name: str, summary: str) -> Command:
    from diffusion_core.stages.pipeline import PipelineOptions

    def run(as_json: bool, **given: Any) -> None:
        _run_pipeline(given, as_json)

    return _command(name, summary, PipelineOptions, run)


def _demo(name: str, summary: str) -> Command:
    from diffusion_core.stages.pipeline import PipelineOptions

    def run(as_json: bool, **given: Any) -> None:
        _run_pipeline({**given, "preset": "digits"}, as_json)

    return _command(name, summary, PipelineOptions, run, only=("settings", "store"))


def _run_pipeline(given: dict[str, Any], as_json: bool) -> None:
    from diffusion_core.stages import pipeline
    from flows import results
    from flows.runner import PIPELINE, run_flow

    options, config = _understood(pipeline.PipelineOptions, given)
    result = run_flow(PIPELINE, lambda: pipeline.check(config), config)
    _show(result, pipeline.rows(result), as_json)
    if not as_json:
        typer.echo("\nnext:")
        for command in results.next_commands(result, options.model_dump()):
            typer.echo(f"  {command}")


def _plan(name: str, summary: str) -> Command:
    from diffusion_core.stages.pipeline import PipelineOptions

    def run(as_json: bool, **given: Any) -> None:
        from diffusion_core.planning import plan
        from diffusion_core.stages import pipeline
        from flows.cli_store import aligned_rows

        _, config = _understood(PipelineOptions, given)
        pipeline.check(config)
        made = plan.make(config, lambda text: typer.echo(text, err=True))
        if as_json:
            print_json(made.model_dump(mode="json"))
        else:
            typer.echo(f"{aligned_rows(plan.table(made))}\n\n{made.memory}")

    return _command(name, summary, PipelineOptions, run)


def _understood(kind: Any, given: dict[str, Any]) -> Any:
    """The options and the configuration; a stack that runs for its store serves it."""
    from diffusion_core.stages.options import understood
    from flows.stack import services

    options, config = understood(kind, given)
    services.adopt(config.store)
    return options, config


def _command(name: str, summary: str, options: type[Options], run: Run, only: tuple[str, ...] | None = None) -> Command:
    """A verb with an option for each field of `options`, or for some, and `--json`."""
    fields = {field: info for field, info in options.asked().items() if only is None or field in only}
    parameters = [_parameter(field, info) for field, info in fields.items()]
    parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))

    def verb(**given: Any) -> None:
        run(**given)

    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, help=summary)(verb)
    return get_command(app)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """What is typed for a field, as text where the configuration checks it."""
    from diffusion_core.stages.options import typed

    how, several = typed(field), get_origin(field.annotation) is tuple
    kind: Any = field.annotation if how.sets is None and not several else list[str] if several else str
    if not field.is_required():
        kind = kind | None
    flags = how.flags or (f"--{name.replace('_', '-')}",)
    info: Any = typer.Argument(help=field.description)
    if not how.argument:
        info = typer.Option(*flags, help=field.description, metavar=how.metavar, envvar=how.environment)
    default = inspect.Parameter.empty if field.is_required() else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _show(result: Config, rows: Rows, as_json: bool) -> None:
    from flows.results import aligned

    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        typer.echo(aligned(rows))
