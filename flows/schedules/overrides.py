"""Fields that differ from a preset: a mapping by path, or a text with one a line, as `training.batch_size: 256`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.settings import field_paths, load_config, parse_fields

Overrides = Mapping[str, Any] | str

_UNREAD_SOURCE = {"name": "diffusion", "source": {"kind": "digits"}}  # for work that reads no source


def resolve(preset: str | None, overrides: Overrides, store: str, source_needed: bool = True) -> PipelineConfig:
    """The configuration that a preset, as it is now, and some overrides stand for.

    Raises:
        UserError: one sentence that names the first field that is wrong, with the nearest one that exists.
    """
    settings = [f"{path}={json.dumps(value)}" for path, value in by_path(overrides).items()]
    unneeded = None if source_needed else _UNREAD_SOURCE
    return load_config(preset, settings=settings, shortcuts={"store": store}, unneeded=unneeded, where="overrides")


def by_path(overrides: Overrides) -> dict[str, Any]:
    """Value by path of a field; `{"training": {"images": 1}}` and `{"training.images": 1}` mean the same."""
    fields = parse_fields(overrides, "overrides") if isinstance(overrides, str) else overrides
    return dict(_flattened(fields, frozenset(field_paths(PipelineConfig))))


def _flattened(fields: Mapping[str, Any], leaves: frozenset[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and path not in leaves:
            yield from _flattened(value, leaves, f"{path}.")
        else:
            yield path, value
