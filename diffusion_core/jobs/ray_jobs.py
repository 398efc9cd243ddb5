"""A job of the Ray Jobs API: its log is followed, its end is asked for, and it is stopped with its actors."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from diffusion_core.config import UserError
from diffusion_core.jobs.lines import FORMAT
from diffusion_core.jobs.transport import GONE, GRACE_S, JobFailed, wrong_token

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")

AGENT_TIMEOUT_S = 60.0
API_PATIENCE_S = 60.0  # that the Jobs API may be away while a job runs: a dead cluster is told within two minutes
POLL_S = 0.5
ANSWER_S = 20.0  # that the API may take for one answer
SILENCE_S = 60.0  # of a log, after which its connection may be dead

logger = logging.getLogger(__name__)


class RayJob:
    """A job of the Ray Jobs API. Each attempt has its own submission id, because ids cannot be used twice."""

    def __init__(self, entrypoint: str, job_id: str) -> None:
        self.process: dict[str, Any] | None = None
        self._id, self._lost = job_id, False
        self._client = _jobs_client(jobs_address())
        self._submit(entrypoint)

    def _submit(self, entrypoint: str) -> None:
        """Submit the job; a cluster that has just started has no agent to take it yet, which is waited for."""
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=self._id,
                    runtime_env={"env_vars": {"PYTHONUNBUFFERED": "1", **_asked_of_jobs()}},
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
        patience_s = API_PATIENCE_S if patience_s is None else patience_s
        try:
            return _asked(lambda: self._client.get_job_info(self._id), patience_s)
        except (OSError, RuntimeError) as error:
            self._lost = True
            raise JobFailed(
                f"The Ray Jobs API at {jobs_address()} gives no news of {self._id}: {str(error).rstrip('.')}. {GONE}"
            ) from error

    def exit_status(self) -> int:
        while not (info := self._info()).status.is_terminal():
            time.sleep(POLL_S)
        if info.status == "SUCCEEDED":
            return 0
        if info.driver_exit_code is None:  # Ray lost the program, as with the node that it ran on
            raise JobFailed(f"The job {self._id} was lost ({info.message}); running it again continues the work.")
        return int(info.driver_exit_code)

    def stop(self, signum: int) -> None:
        """Stop the job with its actors; Ray sends SIGTERM and, after its own grace, SIGKILL."""
        patience_s = 0.0 if self._lost else GRACE_S  # it was waited for long enough
        deadline = time.monotonic() + GRACE_S
        try:
            _asked(lambda: self._client.stop_job(self._id), patience_s)
            while time.monotonic() < deadline and not self._info(patience_s).status.is_terminal():
                time.sleep(POLL_S)
        except (OSError, RuntimeError, JobFailed, UserError) as error:  # must not hide why the job is stopped
            logger.warning("The job %s could not be stopped and may go on: %s", self._id, error)


def _asked_of_jobs() -> dict[str, str]:
    """What the environment of whoever waits asks of the program of a job."""
    return {name: value for name in (FORMAT,) if (value := os.environ.get(name))}


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


def check_jobs_api() -> None:
    """The Jobs API that the environment names answers, and takes this process's token.

    Raises:
        UserError: which of the two is not so.
        JobFailed: it does not answer.
    """
    _jobs_client(jobs_address())


def stop_job(address: str, job_id: str) -> None:
    """Stop a job that another process has submitted; nothing happens if it has ended, or is not known there.

    Raises:
        JobFailed: the Jobs API does not answer, or does not take this process's token.
    """
    try:
        client = _jobs_client(address)
        if any(job.submission_id == job_id and not job.status.is_terminal() for job in client.list_jobs()):
            client.stop_job(job_id)
    except (OSError, RuntimeError, UserError) as error:
        raise JobFailed(f"The job {job_id} could not be stopped and may go on: {error}") from error


def _jobs_client(address: str | None) -> JobSubmissionClient:
    if address is None:
        raise UserError("backend.kind is jobs, which needs RAY_API_SERVER_ADDRESS, as http://head-node:8265.")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    refused = UserError(wrong_token(f"The Ray Jobs API at {address} (RAY_API_SERVER_ADDRESS)"))

    class Client(JobSubmissionClient):
        """With a time-out: the API of a cluster that is dying may take a question and never answer it."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            try:
                return super()._do_request(method, endpoint, **{"timeout": ANSWER_S, **options})
            except AuthenticationError:  # neither OSError nor RuntimeError
                raise refused from None

    try:
        return Client(address)
    except AuthenticationError:  # there is no token to send
        raise refused from None
    except OSError as error:  # that the address is right was seen before the flow began
        raise JobFailed(
            f"The Ray Jobs API at {address} (RAY_API_SERVER_ADDRESS) does not answer: {str(error).rstrip('.')}. {GONE}"
        ) from error
    except RuntimeError as error:
        raise UserError(f"The Ray Jobs API at {address} (RAY_API_SERVER_ADDRESS) cannot be used: {error}") from error
