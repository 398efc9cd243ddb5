"""Runs a flow from the command: with the Prefect server that is there, or with a temporary one."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from diffusion_core.jobs import requests as r
from diffusion_core.jobs.backend import BackendConfig, run_job
from diffusion_core.progress import ProgressEvent
from flows import preflight
from flows.display import shown

PREFECT_DEFAULTS = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows progress; Prefect keeps its whole log
    "PREFECT_CLI_PROMPT": "false",
}


def run_flow(name: str, *arguments: Any) -> Any:
    """Run the flow `name` of `flows.pipeline` in this process and return its result; raises what its stages raise."""
    prepare_prefect()
    signal.signal(signal.SIGTERM, _leave)
    with shown() as display:
        display.say(
            "Starting Prefect …" if os.environ.get("PREFECT_API_URL") else "Starting a temporary Prefect server …"
        )
        from flows import pipeline

        return getattr(pipeline, name)(*arguments)


def run_alone(stage: str, request: r.Request, backend: BackendConfig) -> Any:
    """Run the job of one stage without Prefect, for verbs that are no flow of their own."""
    result_type = {"register": r.RegisterResult}[stage]
    preflight.check_store(request.store)
    preflight.check_services(request.store, backend)
    preflight.check_resources("resources.evaluate", request.resources, backend)
    signal.signal(signal.SIGTERM, _leave)
    with shown() as display:

        def follow(event: ProgressEvent) -> None:
            display.progress(event)

        return run_job(stage, request, result_type, backend, on_progress=follow)


def prepare_prefect() -> None:
    """Settings that have to stand in the environment before Prefect is imported, and a look at its server."""
    set_prefect_defaults()
    preflight.check_prefect()


def set_prefect_defaults() -> None:
    """The settings alone, of which those of the user win, for whoever talks to another server."""
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    """End in good order, so that the job and a temporary server are ended too."""
    sys.exit(128 + signum)
