"""What a person says: the options of a verb, which are the inputs of a form, and what of the configuration they set.

An option that sets a field of the configuration is checked there, which says which field does not accept which value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from diffusion_core.config import Config, UserError, explain

if TYPE_CHECKING:
    from diffusion_core.jobs.request import Request
    from diffusion_core.stages.config import PipelineConfig

OptionsT = TypeVar("OptionsT", bound="Options")


@dataclass(frozen=True)
class Typed:
    """How an option is typed, and what it sets.

    Args:
        sets: path of the field of the configuration that it stands for, or what makes of its value the values of
            several; none: the stage itself reads it.
        resets: paths of fields whose value in a preset says nothing any more where this option is given.
        flags: what is typed, where that is not the option's name.
        metavar: what the value is called in the help.
        environment: variable with its default.
        argument: it is typed without a flag.
        asked_in_forms: also a form has it.
    """

    sets: str | Callable[[Any], Mapping[str, Any]] | None = None
    resets: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    environment: str | None = None
    argument: bool = False
    asked_in_forms: bool = True

    def values(self, value: Any) -> Mapping[str, Any]:
        """Values of the configuration by path."""
        if self.sets is None:
            return {}
        return {self.sets: value} if isinstance(self.sets, str) else self.sets(value)


def typed(field: FieldInfo) -> Typed:
    """How the option of a field is typed."""
    return next((each for each in field.metadata if isinstance(each, Typed)), Typed())


def _source(source: str) -> dict[str, Any]:
    return {"source": {"kind": "digits"}} if source == "digits" else {"source.uri": source}


def _image_size(text: str) -> dict[str, Any]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f"--image-size {text}: give pixels, as 32, or height and width, as 32x48.")
    return {"dataset.image_size": [int(match[1]), int(match[2])] if match[2] else int(match[1])}


def _time_budget(text: str) -> dict[str, Any]:
    from diffusion_core.stages.settings import seconds

    return {"training.time_budget_s": seconds(text, "--time-budget")}


def _labels(text: str) -> dict[str, Any]:
    """`balanced` and paths stay text; anything else is a list of classes."""
    if text == "balanced" or "/" in text or re.search(r"\.(txt|csv|jsonl|parquet)$", text):
        return {"generation.labels": text}
    entries = [entry.strip() for entry in text.split(",")]
    return {"generation.labels": [int(entry) if entry.isdecimal() else entry for entry in entries]}


def _workers(workers: Any) -> dict[str, Any]:
    from diffusion_core.stages.config import StageResources

    return {f"resources.{stage}.workers": workers for stage in StageResources.model_fields}


def _gpus(gpus: Any) -> dict[str, Any]:
    return {f"resources.{stage}.gpus_per_worker": gpus for stage in ("train", "evaluate", "generate")}


Preset = Annotated[
    str | None,
    Field(title="Preset", description="Start from a preset: digits, fashion-mnist, cifar10, digits-flow, …"),
    Typed(flags=("--preset", "-p")),
]
ConfigFile = Annotated[
    str | None,
    Field(description="Start from a YAML file."),
    Typed(flags=("--config", "-c"), metavar="FILE", asked_in_forms=False),
]
Settings = Annotated[
    tuple[str, ...],
    Field(title="Overrides", description="Override any field, as training.batch_size=256."),
    Typed(flags=("--set", "-s"), metavar="FIELD=VALUE"),
]
Store = Annotated[
    str | None,
    Field(title="Store", description="Root of the store: a folder or s3://bucket/prefix."),
    Typed("store", environment="DIFFUSION_STORE"),
]
Backend = Annotated[
    str | None,
    Field(title="Where jobs run", description="local, or jobs (the Ray Jobs API)."),
    Typed("backend.kind"),
]
Name = Annotated[
    str | None, Field(title="Name", description="Name of the dataset, the experiment and the model."), Typed("name")
]
Workers = Annotated[
    int | None, Field(title="Workers", description="Workers of each stage."), Typed(_workers, metavar="N")
]
Gpus = Annotated[
    float | None,
    Field(title="GPUs per worker", description="GPUs of each worker that trains, evaluates or generates."),
    Typed(_gpus, metavar="N"),
]
Source = Annotated[
    str | None,
    Field(title="Source", description="Where the images are: folder, file or s3:// URI, or digits."),
    Typed(_source),
]
ImageSize = Annotated[
    str | None,
    Field(title="Image size (pixels)", description="Size in pixels, as 32, or height and width, as 32x48."),
    Typed(_image_size),
]
Dataset = Annotated[
    str | None, Field(title="Dataset", description="Dataset: name (its newest version), name@version, or URI.")
]
Images = Annotated[
    int | None,
    Field(title="Training length (images)", description="Train until this many images were seen."),
    Typed("training.images", metavar="N"),
]
TimeBudget = Annotated[
    str | None,
    Field(title="Training time (as 20m or 1h30m)", description="Stop training after this time, as 20m or 1200."),
    Typed(_time_budget),
]
BatchSize = Annotated[
    int | None,
    Field(title="Batch size (images)", description="Images of one optimizer step."),
    Typed("training.batch_size", metavar="N"),
]
InitFrom = Annotated[
    str | None,
    Field(title="Start from model", description="Model to start training from: name@alias, run or bundle."),
    Typed("training.init_from"),
]
Samples = Annotated[
    int | None,
    Field(title="Images to measure", description="Images that the evaluation generates."),
    Typed("evaluation.samples", metavar="N"),
]
Count = Annotated[
    int | None, Field(title="Images to make", description="Images to generate."), Typed("generation.count", metavar="N")
]
FirstImageId = Annotated[
    int | None,
    Field(description="First image id; default: the configuration's, else the next free one."),
    Typed("generation.first_image_id", metavar="N", asked_in_forms=False),
]
Labels = Annotated[
    str | None,
    Field(title="Classes", description="balanced, classes as 3,5 or cat,dog, or a file of labels."),
    Typed(_labels),
]

CONFIGURATION = ("preset", "config", "settings")


class Options(Config):
    """What can be typed for every stage: the configuration to start from, and where the work is done and kept."""

    needs_source: ClassVar[bool] = False
    """Whether the source of the images has to be said."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Which of these options the stage has no use for: nobody is asked for them."""

    preset: Preset = None
    config: ConfigFile = None
    settings: Settings = ()
    store: Store = None
    backend: Backend = None

    @classmethod
    def asked(cls) -> dict[str, FieldInfo]:
        """The options that there are, by name."""
        return {name: field for name, field in cls.model_fields.items() if name not in cls.unread}

    def request(self, config: PipelineConfig) -> Request:
        """The request of the stage, of these options and the configuration that they make."""
        raise NotImplementedError


def understood(kind: type[OptionsT], given: Mapping[str, Any], where: str = "--set") -> tuple[OptionsT, PipelineConfig]:
    """The options that are given, and the configuration that they make.

    Args:
        kind: which options there are.
        given: values by name, as text or as they are; None, or an empty list, is not given.
        where: what the settings are called in the sentence about a wrong one.

    Raises:
        UserError: one sentence that names the first option or field that is wrong.
    """
    from diffusion_core.stages.settings import load_config, preset_names

    given = {name: value for name, value in given.items() if value not in (None, [], ())}
    preset, file, settings = given.get("preset"), given.get("config"), list(given.get("settings", ()))
    said = preset or file or given.get("source") or any(item.startswith("source.") for item in settings)
    if kind.needs_source and not said:
        raise UserError(
            f"Say what to work on: --preset ({', '.join(preset_names())}), --config FILE, or --source with --name."
        )
    shortcuts: dict[str, Any] = {}
    for name in (name for name in kind.model_fields if name in given):
        option = typed(kind.model_fields[name])
        shortcuts.update(option.values(given[name]))
        settings = [*(f"{path}=null" for path in option.resets), *settings]
    config = load_config(preset, file, settings, shortcuts, kind.needs_source, where)
    try:
        return kind.model_validate(given), config
    except ValidationError as error:
        raise UserError(explain(error)) from None
