"""Schedules on a real Prefect server with a real worker: they fire by themselves, and a run that lasts is respected."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.store import Directory
from flows.schedules.config import IfRunning, ScheduleConfig, What
from tests.image_files import write_images
from tests.local_stack import Api, free_port, wait_for

QUICK = {
    "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "5",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    "PREFECT_WORKER_QUERY_SECONDS": "3",
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The API of a Prefect server with the pool and its queues, two of them with room for one run, and a worker."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.schedules import server

    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    url = f"http://127.0.0.1:{port}"
    database = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    environment = {**os.environ, **QUICK, "PREFECT_SERVER_DATABASE_CONNECTION_URL": database}
    with ExitStack() as ending:
        ending.enter_context(pytest.MonkeyPatch.context()).setenv("PREFECT_API_URL", f"{url}/api")
        ending.enter_context(temporary_settings({PREFECT_API_URL: f"{url}/api"}))
        _start(["server", "start", "--host", "127.0.0.1", "--port", port], environment, folder / "server.log", ending)
        api = Api(url)
        wait_for(lambda: _answers(api), "the Prefect server", 180)
        api("work_pools/", {"name": server.POOL, "type": "process"})
        for queue in ("training", "generation"):
            api(f"work_pools/{server.POOL}/queues", {"name": queue, "concurrency_limit": 1})
        work = ["worker", "start", "--pool", server.POOL, "--type", "process", "--install-policy", "never"]
        _start(work, environment | {"PREFECT_API_URL": f"{url}/api"}, folder / "worker.log", ending)
        yield api


def _start(arguments: list[str], environment: dict[str, str], log: Path, ending: ExitStack) -> None:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    ending.callback(process.wait, 60)
    ending.callback(process.terminate)


def _answers(api: Api) -> bool:
    try:
        return bool(api("health"))
    except OSError:
        return False


def _runs(api: Api, name: str) -> list[dict[str, Any]]:
    """The runs of a schedule that have had their time, the earliest first."""
    ours = {"deployments": {"name": {"any_": [name]}}, "flows": {"name": {"any_": ["wait-for-file"]}}}
    try:
        runs = api("flow_runs/filter", {**ours, "sort": "EXPECTED_START_TIME_ASC"})
    except OSError:  # a busy server, which will answer later
        return []
    return [run for run in runs if run["state"]["name"] != "Scheduled"]


def _states(api: Api, name: str) -> list[str]:
    return [run["state"]["name"] for run in _runs(api, name)[:2]]


def _start_run(api: Api, flow: str, name: str) -> None:
    deployment = api(f"deployments/name/{flow}/{name}")["id"]
    api(f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})


@pytest.mark.timeout(900)
def test_skip_queue_and_cancel(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of 20 s fires by itself, and the others by hand. Two of the queues have room for one run only."""
    from flows.schedules import server
    from tests.waiting_flow import wait_for_file

    def add(name: str, queue: str, interval: str) -> None:
        monkeypatch.setitem(server.FLOW_OF, What.prune, wait_for_file)
        monkeypatch.setattr(server, "queue_of", {"wait-for-file": queue, "replace-running": "default"}.get)
        config = ScheduleConfig(name=name, what=What.prune, interval=interval, if_running=IfRunning(name))
        row = server.add(config, str(tmp_path / name))
        assert (row["active"], row["if_running"]) == (True, name)

    def may_end(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "go").touch()

    add("skip", "training", "20s")
    add("queue", "default", "24h")
    add("cancel", "generation", "24h")
    for flow, name in (("wait-for-file", "queue"), ("wait-for-file", "queue"), ("wait-for-file", "cancel")):
        _start_run(api, flow, name)
    wait_for(lambda: sorted(_states(api, "queue")) == ["AwaitingConcurrencySlot", "Running"], "a run that waits", 120)
    may_end("queue")
    wait_for(lambda: _states(api, "cancel") == ["Running"], "the run that is to be cancelled", 90)
    _start_run(api, "replace-running", "cancel")
    wait_for(lambda: _states(api, "skip") == ["Running", "Cancelled"], "a run that is skipped", 120)
    assert "concurrency limit" in _runs(api, "skip")[1]["state"]["message"]
    server.set_active("skip", False)
    may_end("skip")
    wait_for(lambda: _states(api, "queue") == ["Completed", "Completed"], "the end of both", 120)

    wait_for(lambda: _states(api, "cancel") == ["Cancelled", "Running"], "a run in place of another", 150)
    may_end("cancel")
    first, second = _runs(api, "cancel")
    assert first["end_time"] <= second["start_time"]
    wait_for(lambda: _states(api, "cancel") == ["Cancelled", "Completed"], "the end", 60)
    assert [(row["name"], row["active"]) for row in server.rows()] == [
        ("cancel", True),
        ("queue", True),
        ("skip", False),
    ]
    for name in ("cancel", "queue", "skip"):
        server.remove(name)
    assert server.rows() == [] and api("deployments/filter", {}) == []


@pytest.mark.timeout(900)
def test_a_watched_folder_makes_a_version_by_itself(api: Api, tmp_path: Path, store: str) -> None:
    from flows.schedules import server

    source = tmp_path / "incoming"
    write_images(source, ["cat/1.png", "cat/2.png", "dog/1.png"])
    fields = {"name": "pets", "source.uri": str(source), "dataset.image_size": 8, "resources.shard.workers": 1}
    row = server.add(ScheduleConfig(name="pets", what=What.watch, interval="10s", overrides=fields), store)
    assert row["parameters"] == {"store": store, "preset": None, "overrides": fields, "still_s": 10}
    happened = {"filter": {"event": {"name": ["diffusion.dataset.created"]}}}
    (event,) = wait_for(lambda: api("events/filter", happened)["events"], "the event", 180)
    assert event["resource"]["prefect.resource.id"] == "diffusion.dataset.pets"
    (version,) = (Directory(store) / "datasets/pets").children()
    assert event["payload"]["version"] == version

    taken = (Directory(store) / "watched").read_json("pets.json")["taken"]
    (source / "cat/1.png").touch()
    wait_for(lambda: (Directory(store) / "watched").read_json("pets.json")["taken"] != taken, "another look", 120)
    server.remove("pets")
    assert (Directory(store) / "datasets/pets").children() == [version]
    assert len(api("events/filter", happened)["events"]) == 1
