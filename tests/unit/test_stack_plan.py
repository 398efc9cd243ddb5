"""What forbids a stack is said before anything is started, and its files lie where nobody empties them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_core.config import UserError
from diffusion_core.store import Directory
from flows import processes
from flows.stack import lifecycle, plan, pool, services
from flows.stack.services import Service

S3 = "s3://bucket/prefix"


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_if_running(store: str, name: str, url: str | None = None, record: str | None = None) -> None:
    """A record of a living process: this one."""
    services.make_folder(store)
    here = processes.this()
    services.record(store, Service(name, here.pid, here.started, url, "log", time.time(), record=record))


def test_a_taken_port_is_told_with_who_has_it(store: str, taken: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--mlflow-port: port {taken} is taken by another program"):
        plan.make(store, free_port(), taken, with_ray=False)
    other = str(tmp_path / "other")
    as_if_running(other, "prefect", f"http://127.0.0.1:{taken}")
    with pytest.raises(UserError, match=f"--prefect-port: port {taken} is taken by the stack of the store {other}"):
        plan.make(store, taken, free_port(), with_ray=False)
    services.forget(other)
    with pytest.raises(UserError, match="another program"):
        plan.make(store, taken, free_port(), with_ray=False)
    assert not Path(Directory(store).uri).exists(), "something was made"


def test_a_running_service_keeps_its_port(store: str, taken: int) -> None:
    as_if_running(store, "prefect", f"http://127.0.0.1:{taken}")
    assert plan.make(store, None, free_port(), with_ray=False).api == f"http://127.0.0.1:{taken}/api"
    with pytest.raises(UserError, match=f"runs on port {taken} already"):
        plan.make(store, taken + 1, free_port(), with_ray=False)


def test_a_service_that_died_comes_back_where_others_look_for_it(store: str, taken: int) -> None:
    services.make_folder(store)
    ray = {"RAY_ADDRESS": "127.0.0.1:1234", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:4321"}
    for name, url, offers in (("prefect", f"http://127.0.0.1:{taken}", {}), ("ray", "http://127.0.0.1:4321", ray)):
        services.record(store, Service(name, 2**22 + 1, "of before", url, "log", time.time(), offers))
    planned = plan.make(store, None, free_port(), with_ray=False)
    assert planned.api == f"http://127.0.0.1:{taken}/api"
    head = planned.servers[-1]
    assert head.offers["RAY_ADDRESS"] == "127.0.0.1:1234" and head.url == "http://127.0.0.1:4321"
    with pytest.raises(UserError, match=f"port {taken} is taken by another program"):  # which took it meanwhile
        lifecycle.up(planned, {})
    assert {"--port=1234", "--dashboard-port=4321"} < set(head.words)
    other = free_port()
    assert plan.make(store, other, free_port(), with_ray=False).api == f"http://127.0.0.1:{other}/api"
    as_if_running(store, "worker")
    with pytest.raises(UserError, match=f"runs on port {taken} already"):
        plan.make(store, other, free_port(), with_ray=False)


def test_jobs_on_the_ray_head_report_to_the_mlflow_of_the_stack() -> None:
    port = free_port()
    head = plan.make(S3, free_port(), port, with_ray=True).servers[-1]
    assert head.name == "ray" and head.environment["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("place", ["local", S3])
def test_a_named_mlflow_means_the_same_everywhere(place: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = store if place == "local" else place
    own = plan.make(where, free_port(), free_port(), with_ray=False)
    assert [server.name for server in own.servers] == ["prefect", "mlflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow:5000")
    named = plan.make(where, free_port(), None, with_ray=False)
    assert [server.name for server in named.servers] == ["prefect"]
    assert named.workers[0].record == "http://mlflow:5000"
    with pytest.raises(UserError, match="leave one of them out") as refused:
        plan.make(where, free_port(), free_port(), with_ray=False)
    assert "secret" not in str(refused.value)
    as_if_running(where, "worker", record=own.workers[0].record)
    with pytest.raises(UserError, match="the environment asks for http://mlflow:5000"):
        plan.make(where, free_port(), None, with_ray=False)


def test_a_registry_is_not_kept_in_a_cache(tmp_path: Path) -> None:
    digest = services.folder(S3).name
    old = tmp_path / "cache" / "diffusion" / digest
    old.mkdir(parents=True)
    (old / "mlflow.db").write_text("models")
    assert services.make_folder(S3) == tmp_path / "data" / "diffusion" / digest
    assert (services.folder(S3) / "mlflow.db").read_text() == "models" and not old.exists()


def test_limits_of_queues() -> None:
    assert pool.limits(["training=2", "default=8"]) == {"training": 2, "default": 8}
    for wrong in ("trainings=2", "training", "training=0", "training=many"):
        with pytest.raises(UserError, match=f"--limit {wrong}: give a queue \\(training, generation, default\\)"):
            pool.limits([wrong])


def test_the_servers_of_a_stack_are_adopted(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "undone afterwards")
    del os.environ["PREFECT_API_URL"]
    services.make_folder(store)
    here, offers = processes.this(), {"PREFECT_API_URL": "http://127.0.0.1:1/api"}
    services.record(store, Service("prefect", here.pid, here.started, "http://127.0.0.1:1", "log", 0.0, offers))
    services.adopt(store)
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
