"""The deployments: one for each stage, and for the pipeline one for each preset, with its values filled in.

A preset is a deployment of its own rather than a choice in one form, because a form sends the defaults of every field
along, which would override whatever preset is chosen in it. Which queue they go to is the pool's to say (`stack.pool`).
"""

from __future__ import annotations

from typing import Any, cast

from prefect import Flow
from prefect.deployments.runner import RunnerDeployment
from prefect.types.entrypoint import EntrypointType

from diffusion_core.stages.settings import as_values, load_config, preset_names
from flows.pipeline import diffusion_pipeline
from flows.stages import FLOWS

INSTALLED = EntrypointType.MODULE_PATH  # workers run the package that they have installed, and pull no code


def deployments(store: str) -> list[RunnerDeployment]:
    """A deployment for each stage; those of the pipeline are named after the presets."""
    return [*(_of_stage(flow) for flow in FLOWS.values()), *(_of_preset(name, store) for name in preset_names())]


def _of_stage(flow: Flow[..., Any]) -> RunnerDeployment:
    return cast(RunnerDeployment, flow.to_deployment(name=flow.name, tags=["diffusion"], entrypoint_type=INSTALLED))


def _of_preset(name: str, store: str) -> RunnerDeployment:
    config = as_values(load_config(preset=name, shortcuts={"store": store}))
    parameters: dict[str, Any] = {"config": config}
    text = f"The whole pipeline, with the values of the preset {name}."
    deployment = diffusion_pipeline.to_deployment(
        name=name, parameters=parameters, tags=["diffusion", "preset"], description=text, entrypoint_type=INSTALLED
    )
    return cast(RunnerDeployment, deployment)
