"""Which runs are taken for dead: the cases that cannot be waited for with a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows import announced, processes
from flows.processes import Process
from flows.stack import settle
from flows.stack.services import Service

ALIVE = processes.this()


@pytest.fixture(scope="module")
def dead() -> Process:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    process = Process.named(child.pid)
    child.wait()
    return process


def a_run(state: str, process: Process | None, age: float, *, worker: bool = True) -> FlowRun:
    at = datetime.fromtimestamp(time.time() - age, UTC)
    labels: dict[str, Any] = {announced.WORKER: "a worker"} if worker else {}
    if process:
        labels |= {announced.HOST: os.uname().nodename, announced.PID: process.pid, announced.STARTED: process.started}
    return FlowRun(
        id=uuid4(), flow_id=uuid4(), labels=labels, start_time=at, state=State(type=StateType(state), timestamp=at)
    )


def a_worker(age: float) -> Service:
    return Service("worker", ALIVE.pid, ALIVE.started, None, "log", time.time() - age)


@pytest.mark.parametrize(
    ("state", "announced", "age", "worker_age", "expected"),
    [
        ("RUNNING", "dead", 60, 600, True),
        ("RUNNING", "dead", 1, 600, False),  # the process of an earlier attempt, not yet replaced
        ("RUNNING", "alive", 60, 10, False),  # it outlives its worker
        ("RUNNING", None, 6000, None, False),  # nothing is known of it
        ("PAUSED", "dead", 60, 600, True),
        ("PENDING", "dead", 30, 600, False),
        ("PENDING", None, 600, 6000, False),  # its worker lives and looks after it
        ("PENDING", None, 600, 10, True),  # its worker is another one by now
        ("PENDING", None, 30, None, False),  # it may still begin
        ("CANCELLING", None, 40, None, True),
        ("CANCELLING", None, 40, 600, False),
        ("CANCELLING", None, 50, 600, True),  # the worker does nothing about it
        ("CANCELLING", "dead", 1, 600, True),
    ],
)
def test_who_is_dead(
    dead: Process, state: str, announced: str | None, age: float, worker_age: float | None, expected: bool
) -> None:
    run = a_run(state, {"dead": dead, "alive": ALIVE}.get(announced or ""), age)
    assert settle._is_dead(run, None if worker_age is None else a_worker(worker_age)) is expected


def test_a_cancel_is_left_to_the_worker_that_has_the_run_for_a_while() -> None:
    assert not settle._is_cancelled_in_vain(a_run("CANCELLING", ALIVE, 20), a_worker(60))
    assert settle._is_cancelled_in_vain(a_run("CANCELLING", ALIVE, 50), a_worker(60))
    assert settle._is_cancelled_in_vain(a_run("CANCELLING", ALIVE, 20), a_worker(10))
    assert settle._is_cancelled_in_vain(a_run("CANCELLING", ALIVE, 1), None)
    assert settle._is_cancelled_in_vain(a_run("CANCELLING", ALIVE, 1, worker=False), a_worker(60)), "of the command"
    assert not settle._is_cancelled_in_vain(a_run("RUNNING", ALIVE, 500), None)
