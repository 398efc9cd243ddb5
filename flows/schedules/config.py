"""A schedule as configuration: what runs, when, with which overrides of a preset, and what if it still runs."""

from __future__ import annotations

import difflib
import zoneinfo
from collections.abc import Mapping
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from diffusion_core.config import Config, UserError, explain
from diffusion_core.stages.overrides import by_path
from diffusion_core.stages.settings import parse_fields, read_yaml, seconds

_SHIPPED = "presets/schedules"


class What(StrEnum):
    """What a schedule starts."""

    pipeline = "pipeline"
    """The whole pipeline; what is found done takes seconds."""
    generate = "generate"
    """New images of a model, by default of the champion."""
    watch = "watch"
    """A look at the source: new files make a new dataset version, and nothing else does."""
    prune = "prune"
    """Deletes what the store can do without."""


class IfRunning(StrEnum):
    """What happens when it is time and the last run is still going."""

    skip = "skip"
    """Nothing: the next one comes at its own time."""
    queue = "queue"
    """The new run waits until the last one has ended."""
    cancel = "cancel"
    """The last one is cancelled, and the new one starts when it has ended."""


class ScheduleConfig(Config):
    """One schedule. Overrides are sparse: a later change of the preset reaches every field that they do not name."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="Name of the schedule.")
    what: What = Field(What.pipeline, description="What it starts: pipeline, generate, watch or prune.")
    preset: str | None = Field(None, description="Preset that the configuration starts from.")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Fields that differ from the preset, as training.batch_size: 256."
    )
    cron: str | None = Field(None, description="When it starts, as 0 2 * * * (minute, hour, day, month, weekday).")
    interval: str | None = Field(None, description="Time from one start to the next, as 20s, 15m or 24h.")
    time_zone: str = Field("UTC", description="Zone of the times, by its IANA name, as Europe/Berlin.")
    if_running: IfRunning = Field(
        IfRunning.skip, description="When the last run is still going: skip, queue, or cancel the last one."
    )
    new_images: bool | None = Field(
        None,
        description="Each run makes new images instead of finding those of the run before. Default: only if generate.",
    )
    model: str | None = Field(None, description="Of generate: the model; default: the champion of the preset's name.")

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, zone: str) -> str:
        known = zoneinfo.available_timezones()
        if zone not in known:
            near = difflib.get_close_matches(zone, known, n=1)
            raise ValueError(f"give an IANA name such as {near[0] if near else 'Europe/Berlin'}, or UTC")
        return zone

    @field_validator("interval")
    @classmethod
    def _some_time(cls, interval: str | None) -> str | None:
        if interval is not None and seconds(interval, "interval") <= 0:
            raise ValueError("it must be more than no time")
        return interval

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if (self.cron is None) == (self.interval is None):
            raise ValueError("give either cron, as '0 2 * * *', or interval, as 24h")
        if self.model is not None and self.what is not What.generate:
            raise ValueError(f"model is of generate alone, and this is {self.what}")
        if self.new_images is not None and self.what not in (What.pipeline, What.generate):
            raise ValueError(f"new_images is of pipeline and generate, and this is {self.what}")
        if self.makes_new_images and "generation.first_image_id" in self.overrides:
            raise ValueError("new_images and generation.first_image_id exclude each other: leave one of them out")
        return self

    @property
    def makes_new_images(self) -> bool:
        return self.what is What.generate if self.new_images is None else self.new_images

    @property
    def interval_s(self) -> float | None:
        return None if self.interval is None else seconds(self.interval, "interval")


def load_schedule(file: str | None, given: Mapping[str, Any]) -> ScheduleConfig:
    """A schedule from a YAML file, or one that comes with the package, and from options; these win.

    Args:
        file: path of a YAML file with the fields of `ScheduleConfig`, or the name of a schedule of the package.
        given: field → value; None means not given. Overrides are added to those of the file.

    Raises:
        UserError: one sentence that names the first field that is wrong.
    """
    values = _read(file) if file else {}
    fields = {name: value for name, value in given.items() if value is not None}
    for one, other in (("cron", "interval"), ("interval", "cron")):
        if one in fields:
            values.pop(other, None)
    overrides = values.get("overrides") or {}
    if isinstance(overrides, dict):
        values["overrides"] = {**by_path(overrides), **fields.pop("overrides", {})}
    try:
        return ScheduleConfig.model_validate({**values, **fields})
    except ValidationError as error:
        raise UserError(f"schedule: {explain(error)}") from None


def shipped() -> list[str]:
    """The schedules that come with the package."""
    folder = resources.files("diffusion_core") / _SHIPPED
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())


def _read(file: str) -> dict[str, Any]:
    if file in shipped():
        text = (resources.files("diffusion_core") / f"{_SHIPPED}/{file}.yaml").read_text()
        return parse_fields(text, f"the schedule {file}")
    return read_yaml(Path(file), "--file")
