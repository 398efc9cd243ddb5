"""Jobs whose waiter is gone end: by themselves, or at the hand of whoever looks for them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from diffusion_core.jobs import orphans, ray_jobs, running
from diffusion_core.jobs.context import IDS
from diffusion_core.jobs.running import RUNNING, Running
from diffusion_core.jobs.transport import JobFailed
from diffusion_core.processes import is_gone, named, this_process
from diffusion_core.store import Directory
from diffusion_core.tracking import RunRecorder
from diffusion_core.tracking.connection import client

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def gone() -> dict[str, object]:
    """A process of this machine that is no more."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = named(process.pid)
    process.communicate()
    assert is_gone(name)
    return name


def put(store: str, job_id: str, found: Running, **ids: str) -> Directory:
    place = Directory(store) / f"jobs/{job_id}"
    place.write_json(RUNNING, found.model_dump())
    place.write_json(IDS, ids)
    return place


def test_an_orphan_is_stopped_with_its_record_and_nothing_else_is(store: str) -> None:
    recorder = RunRecorder(store, "toys", "run")
    elsewhere = {**gone(), "host": "another machine"}
    orphan, kept = (subprocess.Popen(SLEEP, start_new_session=True) for _ in range(2))
    try:
        process = named(orphan.pid)
        place = put(store, "train-1", Running(waiter=gone(), process=process), mlflow_run_id=recorder.mlflow_run_id)
        put(store, "train-2", Running(waiter=this_process(), process=named(kept.pid)))
        put(store, "train-3", Running(waiter=elsewhere, process=named(kept.pid)))
        reused = {**named(kept.pid), "started": "1"}  # the number of a job that ended is another process's now
        put(store, "train-4", Running(waiter=gone(), process=reused))
        assert [job.job_id for job in orphans.stop_orphans(store)] == ["train-1", "train-4"]
        assert orphan.wait(5) != 0 and kept.poll() is None
        assert client(store).get_run(recorder.mlflow_run_id).info.status == "KILLED"
        assert not place.exists(RUNNING)
        assert orphans.stop_orphans(store) == []
    finally:
        for each in (orphan, kept):
            each.kill()
            each.wait()


def test_what_a_killed_job_left_ends_too(store: str) -> None:
    lead = f"import subprocess, sys; print(subprocess.Popen({SLEEP!r}).pid, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", lead]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        assert job.stdout
        member = named(int(job.stdout.readline()))
        put(store, "train-1", Running(waiter=gone(), process=named(job.pid)))
        job.kill()
        job.wait()
        assert not is_gone(member)
        assert len(orphans.stop_orphans(store)) == 1
        assert is_gone(member)


def test_a_run_that_another_job_goes_on_with_stays_running(store: str) -> None:
    recorder = RunRecorder(store, "toys", "run")
    for job_id, waiter in (("train-1", gone()), ("train-2", this_process())):
        put(store, job_id, Running(waiter=waiter), mlflow_run_id=recorder.mlflow_run_id)
    assert len(orphans.stop_orphans(store)) == 1
    assert client(store).get_run(recorder.mlflow_run_id).info.status == "RUNNING"
    recorder.finish()
    orphans.close_record(store, "train-2")
    assert client(store).get_run(recorder.mlflow_run_id).info.status == "FINISHED", "what has ended is left as it is"


def test_mlflow_that_is_away_is_a_warning(store: str, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    put(store, "train-1", Running(waiter=gone()), mlflow_run_id="1234")
    assert len(orphans.stop_orphans(store)) == 1
    assert "MLflow was not told that the run 1234 ended" in caplog.text


def test_a_job_of_a_cluster_is_stopped_there_or_stays_listed(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    jobs = [SimpleNamespace(submission_id="train-1", status=SimpleNamespace(is_terminal=lambda: False))]
    api = SimpleNamespace(list_jobs=lambda: jobs, stop_job=stopped.append)

    def away(_: str) -> SimpleNamespace:
        raise JobFailed("The Ray Jobs API at http://head:8265 does not answer: refused")

    put(store, "train-1", Running(waiter=gone(), api="http://head:8265"))
    put(store, "train-2", Running(waiter=gone(), api="http://head:8265"))  # not known there any more
    monkeypatch.setattr(ray_jobs, "_jobs_client", away)
    assert orphans.stop_orphans(store) == [] and len(orphans.orphans(store)) == 2
    monkeypatch.setattr(ray_jobs, "_jobs_client", lambda address: api)
    assert len(orphans.stop_orphans(store)) == 2 and stopped == ["train-1"]


class Ended(Exception):
    pass


def end() -> None:
    raise Ended


@pytest.fixture
def watch(store: str, monkeypatch: pytest.MonkeyPatch):
    """Look after a job with a clock that each look moves by the time between two; `steps` happen before the looks."""
    place = Directory(store) / "jobs/train-1"

    def run(*steps) -> int:
        ticks, looks = itertools.count(0, running.LOOK_S), iter(steps)

        def sleep(_: float) -> None:
            next(looks)()

        monkeypatch.setattr(running.time, "sleep", sleep)
        next(looks)()
        running._watch(place, end, lambda: next(ticks))
        return next(ticks)

    return place, run


def test_a_job_ends_itself_when_its_waiter_falls_silent_or_leaves(watch) -> None:
    place, run = watch
    here = Running(waiter={"host": "another machine", "pid": 1, "started": "1"})

    def beat(number: int = 0):
        return lambda: place.write_json(RUNNING, here.model_copy(update={"beats": number}).model_dump())

    def nothing() -> None:
        pass

    with pytest.raises(Ended):
        run(beat(1), *[nothing] * 40)
    with pytest.raises(StopIteration):
        run(*[beat(number) for number in range(40)])
    with pytest.raises(Ended):
        run(beat(1), lambda: place.delete(RUNNING))
    run(nothing)  # nobody has ever waited: a program that was started by hand
    with pytest.raises(Ended):
        run(lambda: place.write_json(RUNNING, Running(waiter=gone()).model_dump()))


def test_who_waits_stands_beside_a_running_job(store: str) -> None:
    from diffusion_core.jobs.log import KeptLog

    place = Directory(store) / "jobs/train-1"
    with KeptLog(place, Running(waiter=this_process(), api="http://head:8265")):
        found = running.read(place)
        assert found is not None and found.waiter["pid"] == os.getpid() and found.api == "http://head:8265"
        assert not orphans.orphans(store)
    assert running.read(place) is None
