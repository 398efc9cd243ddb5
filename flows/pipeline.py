"""The flow of the whole pipeline: images in, a trained and evaluated model version and generated images out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from diffusion_core.stages import pipeline
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.pipeline import STEPS, PipelineResult
from flows import artifacts
from flows.runner import check_unless_done
from flows.stages import run_stage


@flow(name="diffusion-pipeline")
def diffusion_pipeline(config: PipelineConfig) -> PipelineResult:
    """Images → dataset version → trained bundle → figures → registered model version → generated images."""
    check_unless_done(lambda: pipeline.check(config))
    done: dict[str, Any] = {}
    for step in STEPS:
        done[step.field] = run_stage(step.stage, step.request(config, done), config.backend)
    result = PipelineResult(name=config.name, store=config.store, **done)
    artifacts.of_pipeline(result)
    return result
