"""One attempt of a job, from its request to its result, wherever it runs.

The request is written to `<store>/jobs/<job id>/request.json`, the very same program is started on it as a subprocess
of this machine or through the Jobs API of a Ray cluster, each line that it prints is handed on, and `result.json` is
read at its end. The lines are in `log.txt`, a few seconds late; `running.json` lies beside it until the wait is over.
Whatever ends the wait (Ctrl-C, SIGTERM, a cancelled flow) ends the job. Nothing here imports Ray before a job is
submitted to a cluster.
"""

from __future__ import annotations

import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import TypeVar

from pydantic import Field

from diffusion_core.config import Config, UserError, execution
from diffusion_core.jobs.lines import plain
from diffusion_core.jobs.local import LocalJob
from diffusion_core.jobs.log import LOG, KeptLog
from diffusion_core.jobs.orphans import close_record
from diffusion_core.jobs.protocol import ERROR, EXIT_USER_ERROR, RESULT
from diffusion_core.jobs.ray_jobs import RayJob, jobs_address
from diffusion_core.jobs.request import Request, Result
from diffusion_core.jobs.running import Running
from diffusion_core.jobs.transport import Handle, JobFailed, program
from diffusion_core.processes import this_process
from diffusion_core.progress import ProgressEvent, parse_progress
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import EXIT_STORE_AWAY, StoreUnavailable

ResultT = TypeVar("ResultT", bound=Result)


class BackendKind(StrEnum):
    """Where the jobs of a flow run."""

    local = "local"
    """Subprocesses of this machine; they join the Ray cluster of RAY_ADDRESS, or start one of their own."""
    jobs = "jobs"
    """The Ray Jobs API at RAY_API_SERVER_ADDRESS, as http://head:8265."""


class BackendConfig(Config):
    """Where jobs run. Addresses come from the environment."""

    kind: BackendKind = execution(
        BackendKind.local,
        description="local: a subprocess of this machine; jobs: the Ray Jobs API at RAY_API_SERVER_ADDRESS.",
    )
    retries: int = execution(
        1, ge=0, le=10, description="Times that a job which broke is started again; it continues where it broke."
    )
    retry_delay_s: float = execution(5, ge=0, le=3600, description="Seconds to wait before a broken job starts again.")


class JobLog(Config):
    """Where a job's files are."""

    job_id: str = Field(description="Stage, time and a random part.")
    uri: str = Field(description="Directory with request.json, result.json or error.json, and log.txt.")


def run_job(
    stage: str,
    request: Request,
    result_type: type[ResultT],
    backend: BackendConfig,
    *,
    on_progress: Callable[[ProgressEvent], None] | None = None,
    on_line: Callable[[str], None] | None = None,
    on_start: Callable[[JobLog], None] | None = None,
) -> ResultT:
    """Run one attempt of one job to its end. `on_line` gets every line that is not a progress line.

    Raises:
        UserError: the sentence that the job ended with.
        JobFailed: the job broke; running it again continues its work.
        StoreUnavailable: the store was away for too long, here or in the job; likewise.
    """
    request = request.model_copy(update={"store": Directory(request.store).uri})  # no relative path: jobs run elsewhere
    job_id = f"{stage}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    place = Directory(request.store) / layout.job(job_id)
    job = JobLog(job_id=job_id, uri=place.uri)
    place.write(layout.REQUEST, request.model_dump_json(indent=2).encode())
    if on_start:
        on_start(job)
    running = Running(waiter=this_process(), api=jobs_address() if backend.kind is BackendKind.jobs else None)
    with KeptLog(place, running) as log, _record_closed(request.store, job_id):
        handle = _start(stage, job, backend)
        try:
            running.process = handle.process
            for line in handle.lines():
                said = plain(line)
                event = parse_progress(said)
                if event is None:
                    log.append(line)
                if event is not None and on_progress:
                    on_progress(event)
                elif event is None and on_line:
                    on_line(said)
            status = handle.exit_status()
        except BaseException as reason:
            handle.stop(signal.SIGINT if isinstance(reason, KeyboardInterrupt) else signal.SIGTERM)
            raise
        return _outcome(stage, place, status, [plain(line) for line in log.lines()], result_type)


@contextmanager
def _record_closed(store: str, job_id: str) -> Iterator[None]:
    """However a job ends that gave no result, its MLflow run does not stay RUNNING."""
    try:
        yield
    except BaseException:
        close_record(store, job_id)
        raise


def _outcome(stage: str, place: Directory, status: int, lines: list[str], result_type: type[ResultT]) -> ResultT:
    if status == 0:
        return result_type.model_validate_json(place.read(RESULT))
    said = [line.removeprefix(f"{stage}: ") for line in lines if line.startswith(f"{stage}: ")]
    if status == EXIT_USER_ERROR:
        with suppress(FileNotFoundError):
            raise UserError(str(place.read_json(ERROR)["error"]))
        if said:  # the job could not write it anywhere else, as to a full store
            raise UserError(said[-1])
    if status == EXIT_STORE_AWAY:
        raise StoreUnavailable(said[-1] if said else f"The store of the {stage} job was away for too long.")
    how = f"was killed by signal {-status}" if status < 0 else f"broke with exit status {status}"
    shown = "\n".join(lines[-25:])
    raise JobFailed(f"The {stage} job {how}; its log is {place.uri}/{LOG} and ends with:\n{shown}")


def _start(stage: str, job: JobLog, backend: BackendConfig) -> Handle:
    arguments = program(stage, f"{job.uri}/{layout.REQUEST}")
    if backend.kind is BackendKind.local:
        return LocalJob([sys.executable, *arguments])
    return RayJob(shlex.join(["python", *arguments]), job.job_id)
