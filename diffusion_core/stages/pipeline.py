"""The stages one after the other: images → dataset version → bundle → figures → model version → images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from diffusion_core.config import Config, UserError
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows
from diffusion_core.stages.evaluate import EvaluateRequest, EvaluateResult, figure_rows
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.stages.register import RegisterRequest, RegisterResult
from diffusion_core.stages.shard import ShardRequest, ShardResult
from diffusion_core.stages.train import TrainRequest, TrainResult

if TYPE_CHECKING:
    from diffusion_core.stages.config import PipelineConfig


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline.

    Args:
        stage: its name.
        field: what its result is called in the result of the pipeline.
        request: makes its request of the configuration and the results so far, by field.
    """

    stage: str
    field: str
    request: Callable[[PipelineConfig, Mapping[str, Any]], Request]


STEPS = (
    Step("shard", "dataset", lambda config, done: ShardRequest.of(config)),
    Step("train", "run", lambda config, done: TrainRequest.of(config, done["dataset"].uri)),
    Step(
        "evaluate",
        "evaluation",
        lambda config, done: EvaluateRequest.of(
            config, done["run"].bundle_uri, done["dataset"].uri, done["run"].mlflow_run_id
        ),
    ),
    Step(
        "register",
        "version",
        lambda config, done: RegisterRequest.of(
            config, config.name, done["run"].bundle_uri, done["dataset"].uri, done["run"].mlflow_run_id
        ),
    ),
    # Of the version that was registered here, champion or not: its set is part of the answer.
    Step(
        "generate",
        "images",
        lambda config, done: GenerateRequest.of(config, done["version"].reference, done["run"].bundle_uri),
    ),
)


class PipelineResult(Config):
    """The results of all stages."""

    name: str
    store: str
    dataset: ShardResult
    run: TrainResult
    evaluation: EvaluateResult
    version: RegisterResult
    images: GenerateResult
    news: str = Field("", description="One sentence: what was done, or since when nothing has changed.")
    changes: dict[str, str] = Field({}, description="What differs from the last run of this name.")
    predicted: dict[str, float] | None = Field(
        None, description="Seconds by stage, if diffusion plan was asked before."
    )

    @property
    def stages(self) -> dict[str, Result]:
        """Result by stage, in order."""
        return {step.stage: getattr(self, step.field) for step in STEPS}


class PipelineOptions(o.Options):
    needs_source: ClassVar[bool] = True

    source: o.Source = None
    name: o.Name = None
    image_size: o.ImageSize = None
    time_budget: o.TimeBudget = None
    images: o.Images = None
    batch_size: o.BatchSize = None
    init_from: o.InitFrom = None
    samples: o.Samples = None
    count: o.Count = None
    first_image_id: o.FirstImageId = None
    workers: o.Workers = None
    gpus_per_worker: o.Gpus = None


def check(config: PipelineConfig) -> None:
    """Everything that a whole pipeline needs. Raises `UserError`, in seconds, without Ray or torch."""
    from diffusion_core.diffusion.config import check_sampler
    from diffusion_core.diffusion.objective_config import check_objective
    from diffusion_core.evaluation.config import check_held_out_figures
    from diffusion_core.stages import checks

    checks.check_store(config.store)
    checks.check_services(config.store, config.backend)
    for stage in type(config.resources).model_fields:
        checks.check_resources(f"resources.{stage}", getattr(config.resources, stage), config.backend)
    checks.check_source(config.source, config.store)
    if config.network.kind == "classifier":
        raise UserError("network.kind: a classifier makes no images to evaluate: train it alone, with diffusion train.")
    checks.check_size(config.source, config.dataset, config.network)
    checks.check_held_out(config.source, config.dataset)
    check_sampler("evaluation.sampler", config.evaluation.sampler, config.process)
    check_sampler("generation.sampler", config.generation.sampler, config.process)
    check_objective("training.objective", config.training.objective, config.process)
    check_held_out_figures("evaluation", config.evaluation, config.process)
    checks.check_evaluation(config.evaluation)
    _check_models(config)


def _check_models(config: PipelineConfig) -> None:
    """The classes are the model's, and the other models that take part are there, suit it, and stay what they are."""
    from diffusion_core.stages import checks

    classes, size = checks.known_classes(config.source), config.dataset.size
    shape = (*size, config.dataset.channels) if size else None
    for field, guidance in (("evaluation", config.evaluation.guidance), ("generation", config.generation.guidance)):
        checks.check_guidance(f"{field}.guidance", guidance, config.process, shape, classes, config.store)
        for name, reference in guidance.models.items():
            checks.check_unmoved(f"{field}.guidance.{name}", reference, config.name)
    checks.check_labels(config.generation, classes)
    start, channels = config.training.init_from, config.dataset.channels
    checks.check_unmoved("training.init_from", start, config.name)
    checks.check_init_from(start, config.network, config.process, channels, config.store)


def rows(result: PipelineResult) -> Rows:
    """The table at the end of a pipeline."""
    dataset, run, version, images = result.dataset, result.run, result.version, result.images
    return [
        ("dataset version", f"{dataset.uri}  {dataset.rows_by_split}, {dataset.rejected} rejected"),
        ("run", f"{run.run_id}  {run.images_seen:,} images seen"),
        ("loss", f"{run.loss:.5f}"),
        *figure_rows(result.evaluation),
        ("model version", f"{version.reference}  {version.alias}"),
        ("", version.reason),
        ("image set", f"{images.uri}  {images.images:,} images, {images.generated:,} new"),
        ("contact sheet", images.contact_sheet),
        ("news", result.news),
        *account_rows(result),
    ]


def account_rows(result: PipelineResult) -> Rows:
    """What each stage took, beside the time that was planned for it: a row a stage."""
    planned = result.predicted or {}
    lines = [_account(name, stage, planned.get(name)) for name, stage in result.stages.items()]
    return [("" if number else "took", line) for number, line in enumerate(lines)]


def _account(name: str, result: Result, planned: float | None) -> str:
    """`train 154 s (planned 160), 623 images/s, 0.079 CPU hours, 39.5 MB`, as far as it was counted."""
    spent = f"{name} {result.seconds:.0f} s"
    if result.reused:
        return f"{spent} (found done)"
    parts = [spent if planned is None else f"{spent} (planned {planned:.0f})"]
    if (took := result.account) is None:
        return parts[0]
    if took.images:
        parts.append(f"{took.images / took.seconds:,.4g} images/s")
    parts.append(f"{took.cpu_seconds / 3600:.3f} CPU hours")
    if took.gpu_seconds:
        parts.append(f"{took.gpu_seconds / 3600:.3f} GPU hours")
    parts.append(f"{took.bytes_written / 1e6:,.1f} MB written")
    if took.s3_requests:
        parts.append(f"{took.s3_requests:,} requests to S3")
    return ", ".join(parts)
