"""Events of the pipeline, on the Prefect server that the run reports to: what automations wait for."""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event

DATASET_CREATED = "diffusion.dataset.created"


def emit(name: str, resource: str, payload: dict[str, Any]) -> None:
    """Tell that something happened to a resource, as `diffusion.dataset.digits`, with ids and figures."""
    emit_event(event=name, resource={"prefect.resource.id": resource}, payload=payload)
