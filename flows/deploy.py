"""The deployments: forms for people, and beside them those with every field.

The forms (`forms`) send only what is filled in, so that the rest comes from the preset. Of those with every field there
is one for each stage, and for the pipeline one for each preset, with its values filled in: it sends all of them along,
which would override whatever preset is chosen in it. Which queue they go to, `stack.pool` says.
"""

from __future__ import annotations

from typing import Any, cast

from prefect import Flow
from prefect.deployments.runner import RunnerDeployment
from prefect.types.entrypoint import EntrypointType

from diffusion_core.stages.settings import as_values, load_config, preset_names
from flows.forms import FORMS
from flows.pipeline import diffusion_pipeline
from flows.stages import FLOWS

INSTALLED = EntrypointType.MODULE_PATH  # workers run the package that they have installed, and pull no code
EVERY_FIELD = "every field"


def deployments(store: str) -> list[RunnerDeployment]:
    """The forms, which know the store; one deployment for each stage; and one of the pipeline for each preset."""
    return [
        *(_of_form(name, flow, store) for name, flow in FORMS.items()),
        *(_of_stage(flow) for flow in FLOWS.values()),
        *(_of_preset(name, store) for name in preset_names()),
    ]


def _of_form(name: str, flow: Flow[..., Any], store: str) -> RunnerDeployment:
    return _deployment(flow, name, ["form"], flow.description, {"store": store})


def _of_stage(flow: Flow[..., Any]) -> RunnerDeployment:
    return _deployment(flow, flow.name, [EVERY_FIELD], flow.description, {})


def _of_preset(name: str, store: str) -> RunnerDeployment:
    config = as_values(load_config(preset=name, shortcuts={"store": store}))
    text = f"The whole pipeline, with the values of the preset {name}."
    return _deployment(diffusion_pipeline, name, ["preset", EVERY_FIELD], text, {"config": config})


def _deployment(
    flow: Flow[..., Any], name: str, tags: list[str], description: str | None, parameters: dict[str, Any]
) -> RunnerDeployment:
    made = flow.to_deployment(
        name=name,
        tags=["diffusion", *tags],
        description=description,
        parameters=parameters,
        entrypoint_type=INSTALLED,
    )
    return cast(RunnerDeployment, made)
