"""Where to look further: the job of a stage, its files, and the pages of Ray and MLflow. No credential is in any.

Ray's dashboard is at the address of its Jobs API, unless DIFFUSION_RAY_UI names another URL for people to look at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusion_core.jobs.backend import BackendConfig, BackendKind
from diffusion_core.jobs.ray_jobs import jobs_address
from diffusion_core.jobs.request import Result
from diffusion_core.stages.base import Rows, Stage
from diffusion_core.stages.registry import STAGES
from diffusion_core.store import layout
from diffusion_core.tracking import page, tracking_uri, without_secrets

RAY_UI = "DIFFUSION_RAY_UI"


def of_stage(stage: Stage[Any, Any], result: Result, store: str, backend: BackendConfig) -> Rows:
    """MLflow's page, the job, and the job's files."""
    rows = [("MLflow", mlflow)] if (mlflow := _mlflow(stage, result, store)) else []
    if result.job:
        files = without_secrets(result.job)
        rows += [
            ("job", _job(result.job, backend)),
            ("log", f"{files}/{layout.LOG}"),
            ("result", f"{files}/{layout.RESULT}"),
        ]
    return rows


def of_pipeline(results: Mapping[str, Result], store: str, backend: BackendConfig) -> list[dict[str, str]]:
    """The same of all stages, a row a stage."""
    return [
        {"stage": name, **dict(of_stage(STAGES[name].load(), result, store, backend))}
        for name, result in results.items()
    ]


def _job(uri: str, backend: BackendConfig) -> str:
    """The job's id, which is also that of its submission to the Ray Jobs API, whose dashboard has a page for it."""
    job_id, address = uri.rpartition("/")[2], os.environ.get(RAY_UI) or jobs_address()
    if backend.kind is not BackendKind.jobs or address is None:
        return job_id
    return f"[{job_id}]({without_secrets(address).rstrip('/')}/#/jobs/{job_id})"


def _mlflow(stage: Stage[Any, Any], result: Result, store: str) -> str | None:
    reference = stage.mlflow and stage.mlflow(result)
    if not reference:
        return None
    if shown := page(reference, store):
        return f"[{reference}]({shown})"
    record = without_secrets(tracking_uri(store))
    return f"{reference} (`mlflow ui --backend-store-uri {record}`)" if record.startswith("sqlite:") else reference
