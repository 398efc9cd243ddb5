"""Fields that differ from a preset, as forms and schedules are told them: a mapping by path, or text.

The text has a field and its value a line, as `training.batch_size: 256` or `training.batch_size = 256`, the value in
YAML. Indented lines belong to the field above them where it has no whole value on its own line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.settings import field_paths, load_config, split_setting

Overrides = Mapping[str, Any] | str

WHERE = "overrides"  # what begins the sentence about a wrong one
_OPEN = (":", "=", ",", "{", "[")


def resolve(preset: str | None, overrides: Overrides, store: str, source_needed: bool = True) -> PipelineConfig:
    """The configuration that a preset, as it is now, and some overrides stand for.

    Raises:
        UserError: one sentence that names the first field that is wrong, with the nearest one that exists.
    """
    shortcuts = {"store": store}
    return load_config(
        preset, settings=as_settings(overrides), shortcuts=shortcuts, source_needed=source_needed, where=WHERE
    )


def as_settings(overrides: Overrides) -> list[str]:
    """The same as `--set` has it: `training.batch_size=256`."""
    return [f"{path}={json.dumps(value, default=str)}" for path, value in by_path(overrides).items()]


def by_path(overrides: Overrides) -> dict[str, Any]:
    """Value by path of a field; `{"training": {"images": 1}}` and `{"training.images": 1}` mean the same."""
    fields = _of_text(overrides) if isinstance(overrides, str) else overrides
    if not isinstance(fields, Mapping):
        raise UserError(f"{WHERE}: {fields!r} is not accepted: give fields and values, as training.batch_size: 256.")
    return dict(_flattened(fields, frozenset(field_paths(PipelineConfig))))


def _of_text(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for entry in _entries(text):
        path, value = split_setting(entry, WHERE)
        if path in fields:
            raise UserError(f"{WHERE} {path}: it is given twice.")
        fields[path] = value
    return fields


def _entries(text: str) -> list[str]:
    """Each field with its value, of one line or, where that leaves it open, of more."""
    found: list[str] = []
    for line in map(str.rstrip, text.splitlines()):
        if not line or line.lstrip().startswith("#"):
            continue
        if found and line[0].isspace() and ("\n" in found[-1] or found[-1].endswith(_OPEN)):
            found[-1] += f"\n{line}"
        else:
            found.append(line.lstrip())
    return found


def _flattened(fields: Mapping[str, Any], leaves: frozenset[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and path not in leaves:
            yield from _flattened(value, leaves, f"{path}.")
        else:
            yield path, value
