"""Jobs whose waiter was killed: they are found by `running.json`, stopped, and their MLflow run is ended.

Only waiters of this machine can be known to be gone. A job whose waiter was on another one ends itself (`running.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from diffusion_core.jobs import running
from diffusion_core.jobs.context import IDS
from diffusion_core.jobs.running import RUNNING, Running
from diffusion_core.jobs.transport import GRACE_S, JobFailed
from diffusion_core.processes import group_lives, is_gone, started
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import patience

_POLL_S = 0.2
_PATIENCE_S = 5.0  # of a job that has ended: somebody waits for the end

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Orphan:
    """A job for which nobody waits any more."""

    job_id: str
    store: str
    running: Running

    @property
    def place(self) -> Directory:
        return Directory(self.store) / layout.job(self.job_id)


def stop_orphans(store: str) -> list[Orphan]:
    """Stop every job of a store whose waiter is gone; those that were stopped. One that cannot be reached stays listed.

    Doing it again is harmless, and finishes what could not be done before.
    """
    return [orphan for orphan in orphans(store) if stop(orphan)]


def orphans(store: str) -> list[Orphan]:
    """The jobs of a store that ran when their waiter, a process of this machine, went without a word."""
    return [orphan for orphan in _waited_for(store) if is_gone(orphan.running.waiter)]


def stop(orphan: Orphan) -> bool:
    """End a job with all its processes and its MLflow run; False, with a warning, if its cluster does not answer."""
    if orphan.running.api:
        from diffusion_core.jobs.ray_jobs import stop_job

        try:
            stop_job(orphan.running.api, orphan.job_id)
        except JobFailed as error:
            logger.warning("%s", error)
            return False
    elif orphan.running.process:
        _end_group(orphan.running.process)
    close_record(orphan.store, orphan.job_id)
    orphan.place.delete(RUNNING)
    logger.warning("The job %s was stopped, for whoever waited for it is gone.", orphan.job_id)
    return True


def close_record(store: str, job_id: str) -> None:
    """Mark the MLflow run of a job that has ended as KILLED if it says RUNNING, unless another job goes on with it.

    MLflow or a store that is away is a warning.
    """
    mlflow_run_id = None
    try:
        with patience(_PATIENCE_S):
            mlflow_run_id = _recorded_in(Directory(store) / layout.job(job_id))
            if mlflow_run_id and not _goes_on(store, job_id, mlflow_run_id):
                from diffusion_core.tracking import end_run

                end_run(store, mlflow_run_id, "KILLED")
    except Exception as error:  # whatever MLflow and its transport raise: it must not hide why the job ended
        logger.warning("MLflow was not told that the run %s ended: %s", mlflow_run_id or f"of {job_id}", error)


def _goes_on(store: str, job_id: str, mlflow_run_id: str) -> bool:
    """Whether another job that somebody waits for records the same run."""
    others = [other for other in _waited_for(store) if other.job_id != job_id and not is_gone(other.running.waiter)]
    return any(_recorded_in(other.place) == mlflow_run_id for other in others)


def _waited_for(store: str) -> Iterator[Orphan]:
    jobs = Directory(store) / layout.JOBS
    for key in [entry.key for entry in jobs.list()]:
        job_id, _, name = key.partition("/")
        if name == RUNNING and (found := running.read(jobs / job_id)):
            yield Orphan(job_id, store, found)


def _recorded_in(place: Directory) -> str | None:
    try:
        found = place.read_json(IDS).get("mlflow_run_id")
    except FileNotFoundError:
        return None
    return str(found) if found else None


def _end_group(process: dict[str, Any]) -> None:
    """SIGTERM to the job, and after its grace SIGKILL to its group, which has the number of its leader."""
    pid = int(process["pid"])
    if is_gone(process) and started(pid):
        return  # the number belongs to somebody else by now
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGTERM)
    _wait_while(lambda: not is_gone(process), GRACE_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    _wait_while(lambda: group_lives(pid), GRACE_S)


def _wait_while(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while holds() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
