"""The flows that schedules start. They are told what differs from a preset, and read the preset when they start."""

from __future__ import annotations

from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field

from diffusion_core.catalog import find
from diffusion_core.config import UserError
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.stages.overrides import resolve
from diffusion_core.stages.pipeline import PipelineResult
from flows.flow import diffusion_flow
from flows.pipeline import run_pipeline
from flows.stages import run_checked

Preset = Annotated[str | None, Field(description="Preset that the configuration starts from.")]
Fields = Annotated[
    dict[str, Any] | str,
    Field(description="Fields that differ from the preset, one a line, as training.batch_size: 256."),
]
Store = Annotated[str, Field(description="Root of the store: a folder or s3://bucket/prefix.")]
NewImages = Annotated[bool, Field(description="Make new images instead of finding those of the run before.")]


@diffusion_flow("diffusion-pipeline", persist_result=False)
def pipeline(
    store: Store, preset: Preset = None, overrides: Fields = "", new_images: NewImages = False
) -> PipelineResult:
    """The whole pipeline. What nothing has changed for is found done in seconds."""
    config = resolve(preset, overrides, store)
    return run_pipeline(config, asked=asked() if new_images else None)


@diffusion_flow("generate-images", persist_result=False)
def generate(
    store: Store,
    preset: Preset = None,
    overrides: Fields = "",
    new_images: NewImages = True,
    model: Annotated[
        str | None, Field(description="models:/name@alias, models:/name/version or a bundle; default: the champion.")
    ] = None,
) -> GenerateResult:
    """Images of a model. Started again after it broke, a run completes the images that it began."""
    config = resolve(preset, overrides, store, source_needed=False)
    reference = find.model_reference(model or f"models:/{config.name}@champion", config.store)
    request = GenerateRequest.of(config, reference)
    if new_images:
        request = request.for_new_images(asked())
    result: GenerateResult = run_checked("generate", request, config.backend)
    return result


def asked() -> str:
    """The id of this flow run: the same when it is tried again, another at the next time of the schedule."""
    if not flow_run.id:
        raise UserError("A scheduled flow makes new images for its flow run, and this is none.")
    return str(flow_run.id)
