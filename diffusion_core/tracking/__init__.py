"""The record of runs and the registry of models: the one place that talks to MLflow.

Without MLFLOW_TRACKING_URI the record is a SQLite file in a local store, `<store>/mlflow.db`, with artifacts in
`<store>/mlartifacts`. MLflow itself is imported when it is first needed: that takes a second or two.
"""

from diffusion_core.tracking.connection import tracking_uri, without_secrets
from diffusion_core.tracking.flow_run import FlowRun
from diffusion_core.tracking.models import ResolvedModel, check_alias, list_models, resolve_model
from diffusion_core.tracking.pages import page
from diffusion_core.tracking.registry import (
    CANDIDATE,
    CHAMPION,
    ServingDefaults,
    champion,
    champion_before,
    champion_history,
    promote,
    register_version,
    rollback,
    set_alias,
    tag_version,
    was_rolled_back,
)
from diffusion_core.tracking.runs import RunRecorder, end_run, record_figures

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "FlowRun",
    "ResolvedModel",
    "RunRecorder",
    "ServingDefaults",
    "champion",
    "champion_before",
    "champion_history",
    "check_alias",
    "end_run",
    "list_models",
    "page",
    "promote",
    "record_figures",
    "register_version",
    "resolve_model",
    "rollback",
    "set_alias",
    "tag_version",
    "tracking_uri",
    "was_rolled_back",
    "without_secrets",
]
