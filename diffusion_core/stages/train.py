"""Dataset version → trained bundle, by a run that every later training of the same kind continues."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pydantic import Field

from diffusion_core.config import execution
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, Stage, seconds
from diffusion_core.stages.events import Event
from diffusion_core.training.run import TrainSpec

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig


class TrainRequest(Request):
    spec: TrainSpec = Field(description="What is trained on what.")
    experiment: str = execution("diffusion", description="MLflow experiment that records the run.")

    @classmethod
    def of(cls, config: PipelineConfig, dataset_uri: str) -> TrainRequest:
        spec = TrainSpec(
            dataset_uri=dataset_uri, process=config.process, network=config.network, training=config.training
        )
        return cls(store=config.store, resources=config.resources.train, spec=spec, experiment=config.name)


class TrainResult(Result):
    run_id: str
    run_uri: str
    bundle_uri: str = Field(description="URI of the exported model bundle.")
    images_seen: int
    loss: float = Field(description="Mean training loss over the last logging interval.")
    images_per_second: float
    mlflow_run_id: str


class TrainOptions(o.Options):
    name: o.Name = None
    dataset: o.Dataset = None
    images: o.Images = None
    time_budget: o.TimeBudget = None
    batch_size: o.BatchSize = None
    init_from: o.InitFrom = None
    workers: o.Workers = None
    gpus_per_worker: o.Gpus = None

    def request(self, config: PipelineConfig) -> TrainRequest:
        from diffusion_core.catalog import find

        return TrainRequest.of(config, find.dataset(self.dataset or config.dataset.name, config.store, "--dataset"))


def check(request: TrainRequest, backend: BackendConfig) -> None:
    """Dataset, network, process and the weights to start from suit each other."""
    from diffusion_core.data.shards import open_dataset
    from diffusion_core.networks.config import check_image_size
    from diffusion_core.stages import checks
    from diffusion_core.training.run import check_task

    checks.check_place(request, "train", backend)
    spec = request.spec
    dataset = open_dataset(spec.dataset_uri)
    height, width, channels = dataset.image_shape
    check_image_size(spec.network, height, width)
    check_task(spec.network, spec.training.objective, spec.process, len(dataset.class_names))
    checks.check_init_from(spec.training.init_from, spec.network, spec.process, channels, request.store)


def run(request: TrainRequest) -> TrainResult:
    """Train, or continue, or find it done; a finished run is answered without Ray.

    Raises:
        UserError: what to train does not fit together; or as `work.train.train_or_watch`.
    """
    from diffusion_core.jobs.context import about
    from diffusion_core.jobs.record import record_afterwards
    from diffusion_core.training.run import open_run

    began = time.monotonic()
    start = _resolved(request)
    place = open_run(request.store, request.spec, start)
    about(run_id=place.run_id, dataset=request.spec.dataset_uri)
    outcome, reused = place.finished(request.spec.training), True
    if outcome is None:
        from diffusion_core.stages.work.train import train_or_watch

        outcome, reused = train_or_watch(request, place, start)
    return TrainResult(
        seconds=time.monotonic() - began,
        reused=reused,
        run_id=place.run_id,
        run_uri=place.directory.uri,
        bundle_uri=place.bundle(outcome.images_seen).uri,
        images_seen=outcome.images_seen,
        loss=outcome.loss,
        images_per_second=outcome.images_per_second,
        mlflow_run_id=outcome.mlflow_run_id
        or record_afterwards(request.store, place, request.experiment, request.asked_by),
    )


def _resolved(request: TrainRequest) -> str | None:
    """The URI of the bundle to start from, if any."""
    reference = request.spec.training.init_from
    if reference is None:
        return None
    from diffusion_core.catalog import find

    return find.bundle_uri(reference, request.store)


def rows(result: TrainResult) -> Rows:
    return [
        ("run", result.run_id),
        ("place", result.run_uri),
        ("bundle", result.bundle_uri),
        ("images seen", f"{result.images_seen:,}"),
        ("loss", f"{result.loss:.5f}"),
        ("images per second", f"{result.images_per_second:,.0f}"),
        ("MLflow run", result.mlflow_run_id),
        ("seconds", seconds(result)),
    ]


def plot(result: TrainResult) -> bytes | None:
    """The loss curve."""
    from diffusion_core.store import Directory
    from diffusion_core.training.curve import loss_curve

    return loss_curve(Directory(result.run_uri))


def events(request: TrainRequest, result: TrainResult) -> list[Event]:
    payload = {"dataset_uri": request.spec.dataset_uri, **result.model_dump(exclude={"reused"})}
    return [Event("diffusion.run.completed", result.run_id, payload, once=str(result.images_seen))]


STAGE = Stage(
    name="train",
    flow="train-model",
    title="Run",
    options=TrainOptions,
    request=TrainRequest,
    result=TrainResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
    picture=lambda result: f"{result.bundle_uri}/samples.png",
    plot=plot,
    mlflow=lambda result: f"runs:/{result.mlflow_run_id}",
)
