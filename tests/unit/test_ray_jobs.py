"""Jobs of the Ray Jobs API, whose connections break: a client that stands in for Ray's breaks them where it is told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest

from diffusion_core.jobs import ray_jobs
from diffusion_core.jobs.ray_jobs import RayJob
from diffusion_core.jobs.transport import JobFailed

TEXT = "".join(f"line {n} äöü\n" for n in range(40))


class JobsApi:
    """Knows one job. The n-th connection to its log breaks after `breaks[n]` characters."""

    def __init__(self, breaks: list[int], ends_after: int = 0) -> None:
        self.breaks, self.ends_after = breaks, ends_after
        self.connections = self.asked = 0
        self.fails: list[Exception] = []

    def submit_job(self, **_: object) -> None:
        return

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        self.connections += 1
        stop = self.breaks.pop(0) if self.breaks else len(TEXT)
        for start in range(0, stop, 7):
            yield TEXT[start : min(stop, start + 7)]
        if stop < len(TEXT):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, _: str) -> SimpleNamespace:
        self.asked += 1
        if self.fails:
            raise self.fails.pop(0)
        return SimpleNamespace(
            status=_Status("SUCCEEDED" if self.asked > self.ends_after else "RUNNING"), driver_exit_code=0
        )

    def stop_job(self, _: str) -> None:
        if self.fails:
            raise self.fails.pop(0)


class _Status(str):
    def is_terminal(self) -> bool:
        return self != "RUNNING"


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[JobsApi], RayJob]:
    monkeypatch.setattr(ray_jobs, "POLL_S", 0.01)

    def start(api: JobsApi) -> RayJob:
        monkeypatch.setattr(ray_jobs, "_jobs_client", lambda address: api)
        return RayJob("python -m job", "generate-1")

    return start


@pytest.mark.parametrize(("breaks", "ends_after"), [([], 0), ([0, 5, 5, 100, 333], 5), ([50], 0), ([len(TEXT)] * 3, 3)])
def test_a_log_that_breaks_off_is_taken_up_without_repeating_lines(job_of, breaks: list[int], ends_after: int) -> None:
    api = JobsApi(list(breaks), ends_after)
    job = job_of(api)
    assert list(job.lines()) == TEXT.splitlines()
    assert job.exit_status() == 0 and api.connections >= len(breaks)


def test_an_api_that_is_away_for_a_while_does_not_end_the_job(job_of) -> None:
    api = JobsApi([30], ends_after=5)
    api.fails = [ConnectionError("refused"), RuntimeError("Request failed with status code 502: bad gateway.")]
    assert list(job_of(api).lines()) == TEXT.splitlines()


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("Request failed with status code 404: x.")])
def test_an_api_that_stays_away_or_does_not_know_the_job_ends_the_wait(job_of, monkeypatch, error: Exception) -> None:
    monkeypatch.setattr(ray_jobs, "API_PATIENCE_S", 0.05)
    monkeypatch.setattr(ray_jobs, "GRACE_S", 0.05)
    api = JobsApi([30])
    api.fails = [error] * 10_000
    job = job_of(api)
    with pytest.raises(JobFailed, match=r"gives no news of generate-1: (refused|Request failed)"):
        list(job.lines())
    job.stop(signal.SIGTERM)  # must not hide why


def test_a_silent_connection_is_made_anew(job_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "SILENCE_S", 0.05)
    api = JobsApi([], ends_after=1)
    speak = api.tail_job_logs

    async def fall_silent(job_id: str) -> AsyncIterator[str]:
        async for chunk in speak(job_id):
            yield chunk
            if api.connections == 1:
                await asyncio.sleep(60)

    monkeypatch.setattr(api, "tail_job_logs", fall_silent)
    assert list(job_of(api).lines()) == TEXT.splitlines()
