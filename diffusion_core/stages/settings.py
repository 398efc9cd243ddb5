"""From a preset or a YAML file, field by field overridden, to a checked `PipelineConfig`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from diffusion_core.config import UserError, explain
from diffusion_core.networks.config import LevelsConfig
from diffusion_core.stages.config import PipelineConfig

_DURATION = re.compile(r"^(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?$")
_SETTING = re.compile(r"([^:=]*[^:=\s])\s*[:=](.*)", re.DOTALL)
_UNREAD_SOURCE = {"name": "diffusion", "source": {"kind": "digits"}}


def load_config(
    preset: str | None = None,
    file: str | None = None,
    settings: Iterable[str] = (),
    shortcuts: Mapping[str, Any] | None = None,
    source_needed: bool = True,
    where: str = "--set",
) -> PipelineConfig:
    """A preset, or a YAML file (which may name the preset it starts from), with overrides; the last word wins.

    Args:
        preset: name of a file of `diffusion_core/presets`.
        file: path of a YAML file with the fields of `PipelineConfig` and, optionally, `preset`.
        settings: `field.path=value` or `field.path: value` with the value in YAML.
        shortcuts: values by field path, as the options of the command give them; None means not given.
        source_needed: whether a source and a name have to be said; work that reads none gets a stand-in.
        where: what the settings are called in the sentence about a wrong one.

    Raises:
        UserError: one sentence that names the first field that is wrong.
    """
    values = read_yaml(Path(file)) if file else {}
    base = values.pop("preset", None)
    if preset and base and preset != base:
        raise UserError(f"--preset is {preset} but {file} starts from the preset {base}: leave one of them out.")
    if preset or base:
        values = _upon(preset or base, values)
    overrides = dict(split_setting(text, where) for text in settings)
    if "network.kind" in overrides:
        _start_another_network(values, {"kind": overrides["network.kind"]})
    for path, value in overrides.items():
        _check_path(path, where)
        _put(values, path, value, where)
    for path, value in (shortcuts or {}).items():
        if value is not None:
            _put(values, path, value, "the options")
    values = values if source_needed else {**_UNREAD_SOURCE, **values}
    _mend_source(values, explicit="source.kind" in overrides)
    return validated(values)


def validated(values: Mapping[str, Any]) -> PipelineConfig:
    """The configuration of these values; `UserError` about the first one that is not accepted."""
    _check_names(values)
    _check_numbers(values)
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("diffusion_core") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_values(name: object) -> dict[str, Any]:
    """The fields that a preset sets, with those of the preset that it starts from itself."""
    if name not in preset_names():
        raise UserError(
            f"There is no preset {name!r}{_nearest(str(name), preset_names())}; {_there_are(preset_names())}."
        )
    text = (resources.files("diffusion_core") / f"presets/{name}.yaml").read_text()
    values = parse_fields(text, f"the preset {name}")
    base = values.pop("preset", None)
    return _upon(base, values) if base else values


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{option} {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not text" if isinstance(error, UnicodeDecodeError) else (error.strerror or "it cannot be read")
        raise UserError(f"{option} {path}: it cannot be read as a YAML file ({why}).") from None
    return parse_fields(text, f"{option} {path}")


def seconds(text: str, option: str = "--time-budget") -> float:
    """`1200`, `20m`, `90s`, `1h30m` or `30d` in seconds."""
    match = _DURATION.match(text.strip())
    if not match or not any(match.groups()):
        raise UserError(f"{option} {text}: it is not a time; give seconds as 1200, or 20m, 1h30m or 30d.")
    days, hours, minutes, rest = (float(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + rest


def as_values(config: BaseModel) -> dict[str, Any]:
    """A configuration as plain values, as YAML and forms want them."""
    return config.model_dump(mode="json")


class _StrictLoader(yaml.SafeLoader):
    """YAML without the two surprises of YAML 1.1: `1e-4` is a number, and a field given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the field {key} is given twice", problem_mark=node.start_mark
                )
        return dict(super().construct_mapping(node, deep))


_StrictLoader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _StrictLoader)  # a SafeLoader: it can build nothing but plain values


def parse_fields(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds; `where` it stands begins the sentence about a mistake in it."""
    try:
        values = _parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: it is not valid YAML{line}: {problem}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{where}: it must hold fields with values, as 'training: {{batch_size: 256}}'.")
    return values


def split_setting(text: str, where: str = "--set") -> tuple[str, Any]:
    """Path and value of `training.batch_size=256` or `training.batch_size: 256`, the value in YAML."""
    match = _SETTING.fullmatch(text.strip())
    if not match:
        raise UserError(f"{where} {text}: give a field and a value, as training.batch_size=256.")
    path, value = match.groups()
    try:
        return path, _parse_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"{where} {path}: {value.strip()!r} is not a YAML value.") from None


def _check_path(path: str, where: str) -> None:
    """Refuse a path that is no field, with the nearest one that is."""
    model: Any = PipelineConfig
    for depth, name in enumerate(path.split(".")):
        fields = _fields_of(model)
        if name not in fields:
            before = ".".join(path.split(".")[:depth])
            if not fields:
                raise UserError(f"{where} {path}: {before} is a single value without fields of its own.")
            near = _nearest(path, field_paths(), limit=3) or _nearest(name, list(fields), before)
            raise UserError(f"{where} {path}: there is no such field{near}.")
        model = fields[name]


def field_paths(model: Any = PipelineConfig, prefix: str = "") -> list[str]:
    """Every field's path, as `training.batch_size`."""
    paths = []
    for name, annotation in _fields_of(model).items():
        inner = field_paths(annotation, f"{prefix}{name}.")
        paths += inner or [prefix + name]
    return paths


def _fields_of(annotation: Any) -> dict[str, Any]:
    """The fields of a configuration class, or of all of those in a union; none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    fields: dict[str, Any] = {}
    for member in get_args(annotation) if get_origin(annotation) in (Union, UnionType, Annotated) else ():
        fields |= _fields_of(member)
    return fields


def _check_names(values: Mapping[str, Any], model: Any = PipelineConfig, prefix: str = "") -> None:
    """Unknown fields first, with the nearest name: a misspelt field is the commonest mistake of a YAML file."""
    fields = _fields_of(model)
    for name, value in values.items():
        if name not in fields:
            near = _nearest(str(name), list(fields), prefix.rstrip("."))
            raise UserError(f"{prefix}{name}: there is no such field{near}.")
        if isinstance(value, dict) and _fields_of(fields[name]):
            _check_names(value, fields[name], f"{prefix}{name}.")


def _check_numbers(value: Any, path: str = "") -> None:
    """Not-a-number and infinity slip through bounds that are absent: no field takes them."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}: {value} is not accepted: it must be a finite number.")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        _check_numbers(item, f"{path}.{name}" if path else str(name))


def _put(values: dict[str, Any], path: str, value: Any, where: str) -> None:
    *folders, name = path.split(".")
    for depth, folder in enumerate(folders):
        inner = values.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise UserError(f"{where} {path}: {'.'.join(folders[: depth + 1])} is {inner!r}, which has no fields.")
        values = inner
    values[name] = value


def _mend_source(values: dict[str, Any], explicit: bool) -> None:
    """A URI given on top of a preset with the bundled digits replaces them."""
    source = values.get("source")
    if isinstance(source, dict) and source.get("uri") and source.get("kind") == "digits" and not explicit:
        source["kind"] = "auto"


def _start_another_network(values: dict[str, Any], network: Any) -> None:
    """A network of another kind starts from its own defaults: what was said of the first one is dropped.

    A classifier is half of a U-Net, so between these two the levels, of which both consist, stay.
    """
    before = values.get("network")
    if not isinstance(before, dict) or not isinstance(network, dict):
        return
    kinds = {network.get("kind"), before.get("kind", "unet")}
    if "kind" in network and len(kinds) == 2:
        kept = LevelsConfig.model_fields if kinds == {"unet", "classifier"} else ()
        values["network"] = {name: before[name] for name in kept if name in before}


def _upon(preset: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that start from a preset."""
    start = preset_values(preset)
    _start_another_network(start, values.get("network"))
    return _merged(start, values)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        inner = result.get(name)
        result[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def _nearest(name: str, names: list[str], prefix: str = "", limit: int = 1) -> str:
    near = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    if not near:
        near = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]][:limit]
    shown = [f"{prefix}.{match}" if prefix else match for match in near]
    return f", did you mean {' or '.join(shown)}?".removesuffix("?") if shown else ""


def _there_are(names: list[str]) -> str:
    return f"there are {', '.join(names)}"
