"""Runs a flow from the command: with the Prefect server that is there, or with a temporary one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from diffusion_core.stages.checks import check_address
from flows.checked import already_checked
from flows.display import shown

PREFECT_DEFAULTS = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows progress; Prefect keeps its whole log
    "PREFECT_CLI_PROMPT": "false",
}
PIPELINE = "pipeline"


def run_flow(name: str, check: Callable[[], None], *arguments: Any) -> Any:
    """Run the flow of a stage, or PIPELINE, in this process and return its result; raises what its stages raise.

    Args:
        name: of the stage.
        check: what can go wrong, looked at before Prefect is started; the flow does not do it again.
        arguments: of the flow.
    """
    check()
    prepare_prefect()
    signal.signal(signal.SIGTERM, _leave)
    with shown() as display:
        display.say(
            "Starting Prefect …" if os.environ.get("PREFECT_API_URL") else "Starting a temporary Prefect server …"
        )
        from prefect import tags

        from flows.pipeline import diffusion_pipeline
        from flows.stages import FLOWS

        flow = diffusion_pipeline if name == PIPELINE else FLOWS[name]
        with already_checked(), tags("diffusion"):
            return flow(*arguments)


def prepare_prefect() -> None:
    """Settings that have to stand in the environment before Prefect is imported, and a look at its server."""
    set_prefect_defaults()
    check_address("PREFECT_API_URL", os.environ.get("PREFECT_API_URL"), default_port=443)


def set_prefect_defaults() -> None:
    """The settings alone, of which those of the user win, for whoever talks to another server."""
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    """End in good order, so that the job and a temporary server are ended too."""
    sys.exit(128 + signum)
