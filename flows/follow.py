"""The job of a stage, followed by the terminal, the Prefect run's log and a Prefect progress artifact."""

from __future__ import annotations

import re
import time
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.runtime import flow_run, task_run

from diffusion_core.jobs.backend import BackendConfig, JobLog, run_job
from diffusion_core.jobs.request import Request, Result
from diffusion_core.progress import ProgressEvent
from diffusion_core.stages.base import Stage
from flows.display import Display, Pace, current_display

ResultT = TypeVar("ResultT", bound=Result)

ARTIFACT_INTERVAL_S = 3.0
_TROUBLE = re.compile(r"diffusion_core\S* (WARNING|ERROR): (.*)")


def follow_job(stage: Stage[Any, ResultT], request: Request, backend: BackendConfig) -> ResultT:
    """Run the job of one stage inside a Prefect task. Raises what `run_job` raises."""
    follower = _Follower(stage.name, current_display())
    result = run_job(
        stage.name,
        request.model_copy(update={"asked_by": flow_run.get_id()}),
        stage.result,
        backend,
        on_progress=follower.progress,
        on_line=follower.line,
        on_start=follower.started,
    )
    follower.finished(result)
    return result


class _Follower:
    """Hands the news of one job on to everyone who watches."""

    def __init__(self, stage: str, display: Display) -> None:
        self._stage, self._display = stage, display
        self._log, self._pace = get_run_logger(), Pace(longest_s=60)
        self._artifact: UUID | None = None
        self._updated_at = 0.0

    def started(self, job: JobLog) -> None:
        again = " again, from where it broke" if task_run.run_count > 1 else ""
        self._display.say(f"{self._stage}{again} …")
        self._log.info("%s: job %s, its files are in %s", self._stage, job.job_id, job.uri)

    def progress(self, event: ProgressEvent) -> None:
        self._display.progress(event)
        if self._pace.due(event):
            self._log.info(event.sentence())
        if event.total and time.monotonic() - self._updated_at >= ARTIFACT_INTERVAL_S:
            self._update_artifact(100 * min(1.0, event.done / event.total), event.sentence())

    def line(self, line: str) -> None:
        if trouble := _TROUBLE.search(line):
            self._display.say(f"  {self._stage}: {trouble[2]}")
            self._log.warning(trouble[2])

    def finished(self, result: Result) -> None:
        if self._artifact:
            self._update_artifact(100, f"{self._stage}: done")
        how = "found done" if result.reused else "done"
        self._display.say(f"{self._stage}: {how} in {result.seconds:.0f} s")
        self._log.info("%s: %s in %.1f s", self._stage, how, result.seconds)

    def _update_artifact(self, percent: float, description: str) -> None:
        try:
            if self._artifact is None:
                key = f"{self._stage}-progress"
                self._artifact = cast(UUID, create_progress_artifact(percent, key=key, description=description))
            else:
                update_progress_artifact(self._artifact, percent, description=description)
        except httpx.HTTPError as error:  # a Prefect server that is away for a while must not end the job
            self._log.info("Prefect was not told of the progress: %s", error)
        self._updated_at = time.monotonic()
