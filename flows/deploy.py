"""The deployments: one for each stage, and for the pipeline one for each preset, with its values filled in.

A preset is a deployment of its own rather than a choice in one form, because a form sends the defaults of every field
along, which would override whatever preset is chosen in it. `python -m flows.deploy` serves them all from this process.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, cast

from prefect import serve
from prefect.deployments.runner import RunnerDeployment

from diffusion_core.stages.settings import as_values, load_config, preset_names
from flows.pipeline import diffusion_pipeline
from flows.runner import prepare_prefect
from flows.stages import FLOWS


def deployments(store: str) -> list[RunnerDeployment]:
    """A deployment for each stage; those of the pipeline are named after the presets."""
    stages = [flow.to_deployment(name=flow.name, tags=["diffusion"], concurrency_limit=4) for flow in FLOWS.values()]
    return [*cast(list[RunnerDeployment], stages), *(_of_preset(name, store) for name in preset_names())]


def _of_preset(name: str, store: str) -> RunnerDeployment:
    config = as_values(load_config(preset=name, shortcuts={"store": store}))
    parameters: dict[str, Any] = {"config": config}
    text = f"The whole pipeline, with the values of the preset {name}."
    deployment = diffusion_pipeline.to_deployment(
        name=name, parameters=parameters, tags=["diffusion", "preset"], description=text
    )
    return cast(RunnerDeployment, deployment)


def main() -> None:
    """Serve all deployments until SIGTERM."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--store", default=os.environ.get("DIFFUSION_STORE", "store"), help="Root of the store.")
    parser.add_argument("--limit", type=int, default=1, help="Flows that run at once.")
    options = parser.parse_args()
    prepare_prefect()
    serve(*deployments(options.store), pause_on_shutdown=False, limit=options.limit)


if __name__ == "__main__":
    main()
