"""Where jobs run: as a subprocess of this machine, or through the Jobs API of a Ray cluster.

Both write the request to `<store>/jobs/<job id>/request.json`, start the very same program on it, hand on each line
that it prints, and read `result.json` at its end. The lines are in `log.txt`, a few seconds late; `running.json` lies
beside it until the wait is over. Whatever ends the wait (Ctrl-C, SIGTERM, a cancelled flow) ends the job. Nothing here
imports Ray before a job is submitted to a cluster.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import queue
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import closing, suppress
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import Field
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from diffusion_core.config import Config, UserError, execution
from diffusion_core.jobs.log import LOG, KeptLog
from diffusion_core.jobs.protocol import ERROR, EXIT_USER_ERROR, RESULT
from diffusion_core.jobs.request import Request, Result
from diffusion_core.progress import ProgressEvent, parse_progress
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import EXIT_STORE_AWAY, StoreUnavailable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")
ResultT = TypeVar("ResultT", bound=Result)

PROGRAM = "diffusion_core.stages"  # the module that is started, with the stage and the URI of its request
AGENT_TIMEOUT_S = 60.0
API_PATIENCE_S = 180.0  # that the Jobs API may be away while a job runs
POLL_S = 0.5
SILENCE_S = 60.0  # of a log, after which its connection may be dead
GRACE_S = 25.0  # less than the 30 seconds after which Prefect kills a cancelled flow

logger = logging.getLogger(__name__)


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


class JobFailed(Exception):
    """A job ended neither well nor with a mistake of the user. The message holds the end of its log."""


class Handle(Protocol):
    """One started job."""

    def lines(self) -> Iterator[str]:
        """The job's output, until it ends."""

    def stop(self, signum: int) -> None:
        """End the job with all its processes, and wait until they are gone."""

    def exit_status(self) -> int:
        """0, 2 for a mistake of the user, anything else for a failure."""


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
    with KeptLog(place) as log:
        handle = _start(stage, job, backend)
        try:
            for line in handle.lines():
                event = parse_progress(line)
                if event is None:
                    log.append(line)
                if event is not None and on_progress:
                    on_progress(event)
                elif event is None and on_line:
                    on_line(line)
            status = handle.exit_status()
        except BaseException as reason:
            handle.stop(signal.SIGINT if isinstance(reason, KeyboardInterrupt) else signal.SIGTERM)
            raise
    return _outcome(stage, place, status, log.lines(), result_type)


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
    request_uri = f"{job.uri}/{layout.REQUEST}"
    if backend.kind is BackendKind.local:
        return LocalJob([sys.executable, "-m", PROGRAM, stage, request_uri])
    return ClusterJob(stage, request_uri, job.job_id)


class LocalJob:
    """A job as a subprocess, leader of its own session, so that a Ctrl-C of the terminal reaches it through us only."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=_die_with_parent if _LIBC else None,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def lines(self) -> Iterator[str]:
        for line in self._output():
            yield line.decode(errors="replace").rstrip("\r\n")

    def exit_status(self) -> int:
        return self._process.wait()

    def stop(self, signum: int) -> None:
        """Ask the job to end its workers in good order; after the grace, or at a second Ctrl-C, kill its group."""
        try:
            with suppress(ProcessLookupError):
                self._process.send_signal(signum)
            with suppress(subprocess.TimeoutExpired):
                self._drain(GRACE_S)
        finally:
            self._kill_group()
            self._process.wait()

    def _drain(self, timeout_s: float) -> None:
        """Wait for the end while reading on: a job that fills an unread pipe would never end."""
        reader = threading.Thread(target=lambda: deque(self._output(), maxlen=0), daemon=True)
        reader.start()
        self._process.wait(timeout_s)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # the leader's pid names the group while a member lives
            os.killpg(self._process.pid, signal.SIGKILL)

    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout


class ClusterJob:
    """A job of the Ray Jobs API. Each attempt has its own submission id, because ids cannot be used twice."""

    def __init__(self, stage: str, request_uri: str, job_id: str) -> None:
        self._id = job_id
        self._client = _jobs_client()
        self._submit(f"python -m {PROGRAM} {stage} {shlex.quote(request_uri)}")

    def _submit(self, entrypoint: str) -> None:
        """Submit the job; a cluster that has just started has no agent to take it yet, which is waited for."""
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=self._id,
                    runtime_env={"env_vars": {"PYTHONUNBUFFERED": "1"}},
                )
                return
            except (RuntimeError, OSError) as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise JobFailed(f"The Ray Jobs API did not take the job {self._id}: {error}") from error
            time.sleep(1.0)

    def lines(self) -> Iterator[str]:
        chunks: queue.Queue[str | BaseException | None] = queue.Queue()
        threading.Thread(target=self._follow, args=(chunks,), daemon=True).start()
        rest = ""
        while (chunk := chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            *whole, rest = (rest + chunk).split("\n")
            yield from whole
        if rest:
            yield rest

    def _follow(self, chunks: queue.Queue[str | BaseException | None]) -> None:
        """Hand on the whole log. A connection that breaks says nothing about the job: it is made again."""
        handed_on, last = 0, False
        while True:
            whole, at = True, 0
            try:
                with closing(_each(self._client.tail_job_logs(self._id))) as log:
                    for chunk in log:  # each connection begins with the first line
                        at += len(chunk)
                        if at > handed_on:
                            chunks.put(chunk[handed_on - at :])
                            handed_on = at
            except Exception as error:
                logger.info("The connection to the log of %s broke: %s", self._id, error)
                whole = False
            try:
                ended = self._info().status.is_terminal()
            except Exception as error:  # handed to the thread that waits for the lines
                chunks.put(error)
                return
            if ended and (whole or last):
                chunks.put(None)
                return
            last = ended  # what it printed at its end may still be missing
            time.sleep(POLL_S)

    def _info(self, patience_s: float | None = None) -> JobDetails:
        """What the Jobs API knows of the job; `JobFailed` if it does not know it, or stays away for minutes."""
        try:
            return _asked(lambda: self._client.get_job_info(self._id), patience_s or API_PATIENCE_S)
        except (OSError, RuntimeError) as error:
            raise JobFailed(f"The Ray Jobs API at {jobs_address()} gives no news of {self._id}: {error}") from error

    def exit_status(self) -> int:
        while not (info := self._info()).status.is_terminal():
            time.sleep(POLL_S)
        if info.status == "SUCCEEDED":
            return 0
        return info.driver_exit_code if info.driver_exit_code is not None else 1

    def stop(self, signum: int) -> None:
        """Stop the job with its actors; Ray sends SIGTERM and, after its own grace, SIGKILL."""
        deadline = time.monotonic() + GRACE_S
        try:
            _asked(lambda: self._client.stop_job(self._id), GRACE_S)
            while time.monotonic() < deadline and not self._info(GRACE_S).status.is_terminal():
                time.sleep(POLL_S)
        except (OSError, RuntimeError, JobFailed) as error:  # must not hide why the job is stopped
            logger.warning("The job %s could not be stopped and may go on: %s", self._id, error)


def _asked(ask: Callable[[], T], patience_s: float) -> T:
    """The answer of the Jobs API, asked again while it is away; the last error if that takes too long."""
    retrying = Retrying(
        retry=retry_if_exception(_is_away),
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(multiplier=POLL_S, max=10),
        reraise=True,
    )
    return retrying(ask)


def _is_away(error: BaseException) -> bool:
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and "status code 5" in str(error))


def _each(chunks: AsyncIterator[str]) -> Generator[str]:
    """What an asynchronous iterator yields; `TimeoutError` if it is silent for long."""
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(asyncio.wait_for(anext(chunks), SILENCE_S))
            except StopAsyncIteration:
                return


def jobs_address() -> str | None:
    """The Jobs API that the environment names, None if it names none."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    return address.rstrip("/") if address.startswith(("http://", "https://")) else None


def _jobs_client() -> JobSubmissionClient:
    address = jobs_address()
    if address is None:
        raise UserError("backend.kind is jobs, which needs RAY_API_SERVER_ADDRESS, as http://head-node:8265.")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except OSError as error:  # that the address is right was seen before the flow began
        raise JobFailed(f"The Ray Jobs API at {address} (RAY_API_SERVER_ADDRESS) does not answer: {error}") from error
    except RuntimeError as error:
        raise UserError(f"The Ray Jobs API at {address} (RAY_API_SERVER_ADDRESS) cannot be used: {error}") from error


def _die_with_parent() -> None:
    """In the child, before exec: have the kernel send SIGTERM when the process that waits for the job is killed."""
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
