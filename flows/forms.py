"""The forms for people: of the pipeline and of each stage a second flow, with the options of its verb as flat inputs.

`FORMS` has them by name of the deployment. What is left empty is not said: it comes from the preset as it is when the
run starts. A run of a form is the run that the verb makes, with names for what lies in the store, and no URI.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args, get_origin

from prefect import Flow
from pydantic import Field, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import MISSING

from diffusion_core.config import UserError
from diffusion_core.stages import pipeline
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.options import Options, typed, understood
from diffusion_core.stages.registry import STAGES, Entry
from diffusion_core.stages.settings import preset_names
from flows.checked import check_unless_done
from flows.flow import diffusion_flow
from flows.pipeline import diffusion_pipeline, run_pipeline
from flows.stages import run_stage

Work = Callable[[Any, PipelineConfig], Any]

OVERRIDES = "overrides"  # the settings of a verb, in one field of text
_LINE = re.compile(r"([\w.]+)\s*[:=]\s*(.*)")
_OPTION = re.compile(r"--[a-z-]+")
_KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def filled_in(kind: type[Options], given: Mapping[str, Any]) -> tuple[Any, PipelineConfig]:
    """The options and the configuration that a form stands for; UserError about the first input that is wrong."""
    said = {name: value for name, value in given.items() if value not in ("", None, MISSING)}
    settings = list(_settings(said.pop(OVERRIDES, "")))
    for name in said.keys() & kind.model_fields.keys():
        if _is_list(kind.model_fields[name]):
            said[name] = re.split(r"[,\s]+", said[name].strip())
    with _in_words(kind):
        return understood(kind, {**said, "settings": settings}, OVERRIDES)


@contextmanager
def _in_words(kind: type[Options]) -> Iterator[None]:
    """A mistake is told with the title of the input, where the verb tells it with its option."""
    titles = {f"--{name.replace('_', '-')}": _title(name, field) for name, field in kind.model_fields.items()}
    try:
        yield
    except UserError as error:
        raise UserError(_OPTION.sub(lambda match: titles.get(match[0], match[0]), str(error))) from None


def _settings(text: str) -> Iterator[str]:
    """`training.batch_size: 256`, one a line, as a verb has it: `training.batch_size=256`."""
    for line in filter(None, map(str.strip, text.splitlines())):
        match = _LINE.fullmatch(line)
        yield f"{match[1]}={match[2]}" if match else line


def _form(flow_name: str, name: str, summary: str, kind: type[Options], work: Work, inputs: Sequence[str]) -> Any:
    """A flow with an input for each of these options; the worker finds it in this module by `name`."""

    def run(**given: Any) -> Any:
        return work(*filled_in(kind, given))

    parameters = [_parameter(field, kind.model_fields[field]) for field in inputs]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__name__ = run.__qualname__ = name.replace("-", "_")
    return diffusion_flow(flow_name, description=summary, persist_result=False)(run)


def _inputs(kind: type[Options]) -> list[str]:
    """The options that a form asks for, in its order: what is seldom changed comes last."""
    last = ("store", "backend", "settings") if kind.needs_source else ("preset", "store", "backend", "settings")
    asked = [name for name, field in kind.model_fields.items() if typed(field).asked_in_forms]
    if not kind.needs_configuration:
        asked = [name for name in asked if name not in ("preset", "settings")]
    return sorted(asked, key=lambda name: last.index(name) if name in last else -1)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """An input of a plain type, which may be left empty. What it takes is checked by what it sets."""
    shape = {"title": _title(name, field), **_shape(name, field)}
    help_ = field.description
    default = ... if field.is_required() else MISSING  # None would be sent along, and refused as no text or number
    if name == "settings":
        name, help_ = OVERRIDES, "Any other field of the configuration, one a line, as training.batch_size: 256."
    info = Field(default, description=help_, json_schema_extra=shape)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=Any)


def _title(name: str, field: FieldInfo) -> str:
    return field.title or name.replace("_", " ").capitalize()


def _shape(name: str, field: FieldInfo) -> dict[str, Any]:
    """The JSON schema of an input: that of the field which it sets, as far as it is one value."""
    if name == "preset":
        return {"type": "string", "enum": preset_names()}
    if _is_list(field):
        return {"type": "string"}
    sets = typed(field).sets
    shape = _of_path(sets) if isinstance(sets, str) else {}
    if "type" not in shape:
        kinds = [each for each in get_args(field.annotation) if each is not type(None)] or [field.annotation]
        shape = TypeAdapter(kinds[0]).json_schema()
    return {key: value for key, value in shape.items() if key in _KEPT}


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _of_path(path: str) -> dict[str, Any]:
    """The schema of a field of the configuration, of which None, where it is accepted, is left out."""
    schema = _whole()
    for name in path.split("."):
        schema = _resolved(schema["properties"][name])
    return next((_resolved(each) for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema)


@cache
def _whole() -> dict[str, Any]:
    return PipelineConfig.model_json_schema()


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    return _whole()["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _of_pipeline() -> Flow[..., Any]:
    summary = str(diffusion_pipeline.description)
    options = pipeline.PipelineOptions
    flow_name, inputs = diffusion_pipeline.name, _inputs(options)
    return _form(flow_name, "pipeline", summary, options, lambda _, config: run_pipeline(config), inputs)


def _of_stage(entry: Entry) -> Iterator[tuple[str, Flow[..., Any]]]:
    """The form of a stage, which has its name, and the shorter ones that it names itself."""
    stage = entry.load()

    def work(options: Any, config: PipelineConfig) -> Any:
        with _in_words(stage.options):
            request, backend = options.request(config), config.backend
        check_unless_done(lambda: stage.check(request, backend))
        return run_stage(stage.name, request, backend)

    inputs = [name for name in _inputs(stage.options) if stage.is_job or name != "backend"]
    yield stage.name, _form(stage.flow, stage.name, entry.summary, stage.options, work, inputs)
    for form in stage.short_forms:
        yield form.name, _form(stage.flow, form.name, form.summary, stage.options, work, form.inputs)


FORMS = {"pipeline": _of_pipeline(), **{name: made for entry in STAGES.values() for name, made in _of_stage(entry)}}
globals().update({made.fn.__name__: made for made in FORMS.values()})
