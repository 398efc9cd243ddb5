"""How a job's program is started and followed, wherever it runs; `local.py` and `ray_jobs.py` implement it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

GONE = "If the cluster is gone, running it again on the next one continues the work."
GRACE_S = 25.0  # of a job that is asked to end: less than the 30 seconds after which Prefect kills a cancelled flow


class JobFailed(Exception):
    """A job ended neither well nor with a mistake of the user. The message holds the end of its log."""


class Handle(Protocol):
    """One started job.

    process: what names the job's process of this machine for `processes.is_gone`; None if it runs elsewhere.
    """

    process: dict[str, Any] | None

    def lines(self) -> Iterator[str]:
        """The job's output, until it ends."""

    def stop(self, signum: int) -> None:
        """End the job with all its processes, and wait until they are gone."""

    def exit_status(self) -> int:
        """0, 2 for a mistake of the user, anything else for a failure."""


def wrong_token(cluster: str) -> str:
    """The sentence for a cluster that does not take this process's token, or its lack of one."""
    return (
        f"{cluster} does not accept the token of this process: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH to the token that the cluster was started with."
    )


def program(stage: str, request_uri: str) -> list[str]:
    """Arguments of the interpreter that runs the job of a stage, on every transport."""
    return ["-m", "diffusion_core.stages", stage, request_uri]
