"""The flow of the whole pipeline: images in, a trained and evaluated model version and generated images out."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger

from diffusion_core.planning import plan
from diffusion_core.stages import pipeline
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.generate import GenerateRequest
from diffusion_core.stages.pipeline import STEPS, PipelineResult
from flows import artifacts, last_run
from flows.checked import check_unless_done
from flows.flow import diffusion_flow
from flows.stages import run_stage


@diffusion_flow("diffusion-pipeline")
def diffusion_pipeline(config: PipelineConfig) -> PipelineResult:
    """Images → dataset version → trained bundle → figures → registered model version → generated images."""
    return run_pipeline(config)


def run_pipeline(config: PipelineConfig, asked: str | None = None) -> PipelineResult:
    """The stages one after the other. `asked` names who asks for new images, in place of those that are configured."""
    check_unless_done(lambda: pipeline.check(config))
    done: dict[str, Any] = {}
    for step in STEPS:
        request = step.request(config, done)
        if asked and isinstance(request, GenerateRequest):
            request = request.for_new_images(asked)
        done[step.field] = run_stage(step.stage, request, config.backend)
    result = PipelineResult(name=config.name, store=config.store, **done)
    told = {
        "news": last_run.news(result),
        "changes": last_run.changes(result, config),
        "predicted": plan.predicted(config),
    }
    result = result.model_copy(update=told)
    get_run_logger().info(result.news)
    artifacts.of_pipeline(result, config)
    return result
