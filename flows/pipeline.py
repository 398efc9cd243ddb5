"""The flows: images in, a dataset version, a trained and evaluated model version, and a set of generated images out.

Each stage is a job that finds its own finished work: running a flow again is how anything that broke is mended, and
running a finished one is quick. The flows know requests and results, and nothing of how a job does its work.
"""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from diffusion_core.jobs import requests as r
from diffusion_core.jobs.backend import BackendConfig
from flows import artifacts, find, preflight
from flows.config import PipelineConfig
from flows.results import PipelineResult
from flows.stack.runs import announce
from flows.tasks import Stages

LOCAL = BackendConfig()


@flow(name="diffusion-pipeline", on_running=[announce])
def diffusion_pipeline(config: PipelineConfig) -> PipelineResult:
    """Images → dataset version → trained bundle → figures → registered model version → generated images."""
    preflight.check_pipeline(config)
    stages = Stages(config.backend)

    dataset = stages.shard(config.shard_request())
    run = stages.train(config.train_request(dataset))
    evaluation = stages.evaluate(config.evaluate_request(dataset, run))
    version = stages.register(config.register_request(dataset, run))
    images = stages.generate(config.generate_request(version))

    result = PipelineResult(
        name=config.name,
        store=config.store,
        dataset=dataset,
        run=run,
        evaluation=evaluation,
        version=version,
        images=images,
    )
    return artifacts.of_pipeline(result)


@flow(name="shard-dataset", on_running=[announce])
def shard_dataset(request: r.ShardRequest, backend: BackendConfig = LOCAL) -> r.ShardResult:
    """Turn a source of images into a dataset version: Parquet shards with a manifest."""
    preflight.check_shard(request, backend)
    return Stages(backend).shard(request)


@flow(name="train-model", on_running=[announce])
def train_model(request: r.TrainRequest, backend: BackendConfig = LOCAL) -> r.TrainResult:
    """Train a diffusion model on a dataset version, or continue its run, and export a bundle."""
    preflight.check_train(request, backend)
    return Stages(backend).train(request)


@flow(name="evaluate-model", on_running=[announce])
def evaluate_model(request: r.EvaluateRequest, backend: BackendConfig = LOCAL) -> r.EvaluateResult:
    """Measure a model bundle against a dataset version, beside the same figures for held-out real images."""
    preflight.check_evaluate(request, backend)
    return Stages(backend).evaluate(request)


@flow(name="compare-samplers", on_running=[announce])
def compare_samplers(request: r.CompareRequest, backend: BackendConfig = LOCAL) -> r.CompareResult:
    """Measure samplers of one model against each other: quality of the images against network evaluations."""
    preflight.check_compare(request, backend)
    return Stages(backend).compare(request)


@flow(name="export-average", persist_result=False, on_running=[announce])
def export_average(
    run: Annotated[str, Field(description="Run, by its id or URI, that was trained with training.ema=power.")],
    sigma_rel: Annotated[float, Field(ge=0.01, le=0.28, description="Relative width of the average.")],
    store: Annotated[str, Field(description="Root of the store: a folder or s3://bucket/prefix.")],
    images_seen: Annotated[int | None, Field(ge=1, description="At which end of training; default: the last.")] = None,
) -> str:
    """Make a bundle of a finished run with a moving average of another length, without training again; its URI."""
    from diffusion_core.training import posthoc
    from diffusion_core.training.run import RunDirectory

    return posthoc.export(RunDirectory(find.run(run, store)), sigma_rel, images_seen)


@flow(name="generate-images", on_running=[announce])
def generate_images(request: r.GenerateRequest, backend: BackendConfig = LOCAL) -> r.GenerateResult:
    """Generate images with a model version, or complete and extend the set that they belong to."""
    preflight.check_generate(request, backend)
    return Stages(backend).generate(request)
