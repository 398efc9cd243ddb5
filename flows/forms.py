"""The forms for people: of the pipeline and of each stage a second flow, with the options of its verb as flat inputs.

`FORMS` has them by name of the deployment. What is left empty is not said: it comes from the preset as it is when the
run starts. A run of a form is the run that the verb makes, with names for what lies in the store, and no URI.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args, get_origin

from prefect import Flow
from pydantic import Field, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import MISSING

from diffusion_core.config import UserError
from diffusion_core.stages import overrides, pipeline
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.options import Options, typed, understood
from diffusion_core.stages.registry import STAGES, Entry
from diffusion_core.stages.settings import preset_names
from flows.flow import diffusion_flow
from flows.pipeline import diffusion_pipeline, run_pipeline
from flows.stages import run_checked

Work = Callable[[Any, PipelineConfig], Any]

_OPTION = re.compile(r"--[a-z-]+")
_KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def filled_in(kind: type[Options], given: Mapping[str, Any]) -> tuple[Any, PipelineConfig]:
    """The options and the configuration that a form stands for; UserError about the first input that is wrong."""
    said = {name: value for name, value in given.items() if value not in ("", None, MISSING)}
    settings = overrides.as_settings(said.pop(overrides.WHERE, ""))
    for name in said.keys() & kind.model_fields.keys():
        said[name] = _as_typed(said[name], kind.model_fields[name])
    with in_words(kind):
        return understood(kind, {**said, "settings": settings}, overrides.WHERE)


def _as_typed(value: Any, field: FieldInfo) -> Any:
    """Text for what takes text: an API may be told a number, or a list where the form has commas."""
    if _is_list(field):
        return re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
    if _kind(field) is str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return value


@contextmanager
def in_words(kind: type[Options]) -> Iterator[None]:
    """A mistake is told with the title of the input, where the verb tells it with its option."""
    titles = {f"--{name.replace('_', '-')}": _title(name, field) for name, field in kind.model_fields.items()}
    try:
        yield
    except UserError as error:
        raise UserError(_OPTION.sub(lambda match: titles.get(match[0], match[0]), str(error))) from None


def _form(flow_name: str, name: str, summary: str, kind: type[Options], work: Work) -> Any:
    """A flow with an input for each option that is asked for; the worker finds it in this module by `name`."""

    def run(**given: Any) -> Any:
        return work(*filled_in(kind, given))

    parameters = [_parameter(field, kind.model_fields[field]) for field in _inputs(kind)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__name__ = run.__qualname__ = name.replace("-", "_")
    return diffusion_flow(flow_name, description=summary, persist_result=False)(run)


def _inputs(kind: type[Options]) -> list[str]:
    """The options that a form asks for, in its order: what is seldom changed comes last."""
    last = ("store", "backend", "settings") if kind.needs_source else ("preset", "store", "backend", "settings")
    asked = [name for name, field in kind.asked().items() if typed(field).asked_in_forms]
    return sorted(asked, key=lambda name: last.index(name) if name in last else -1)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """An input of a plain type, which may be left empty. What it takes is checked by what it sets."""
    shape = {"title": _title(name, field), **_shape(name, field)}
    help_ = field.description
    default = ... if field.is_required() else MISSING  # None would be sent along, and refused as no text or number
    if name == "settings":
        name, help_ = overrides.WHERE, "Any other field of the configuration, one a line, as training.batch_size: 256."
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
        shape = TypeAdapter(_kind(field)).json_schema()
    return {key: value for key, value in shape.items() if key in _KEPT}


def _kind(field: FieldInfo) -> Any:
    """The type of an option, without None."""
    return next((each for each in get_args(field.annotation) if each is not type(None)), field.annotation)


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
    return _form(diffusion_pipeline.name, "pipeline", summary, options, lambda _, config: run_pipeline(config))


def _of_stage(entry: Entry) -> Iterator[tuple[str, Flow[..., Any]]]:
    """The form of a stage, which has its name, and the shorter ones that it names itself."""
    stage = entry.load()

    def work(options: Any, config: PipelineConfig) -> Any:
        with in_words(type(options)):
            request = options.request(config)
        return run_checked(stage.name, request, config.backend)

    yield stage.name, _form(stage.flow, stage.name, entry.summary, stage.options, work)
    for form in stage.short_forms:
        yield form.name, _form(stage.flow, form.name, form.summary, form.options, work)


FORMS = {"pipeline": _of_pipeline(), **{name: made for entry in STAGES.values() for name, made in _of_stage(entry)}}
globals().update({made.fn.__name__: made for made in FORMS.values()})
