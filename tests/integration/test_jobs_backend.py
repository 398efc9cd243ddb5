"""Jobs on a real cluster that wants a token: the same lines, results and sentences, its figures, and how jobs end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusion_core.config import UserError
from diffusion_core.data.config import DatasetConfig, SourceConfig, SourceKind
from diffusion_core.jobs import backend, orphans, ray_jobs
from diffusion_core.jobs.backend import BackendConfig, BackendKind, JobLog, run_job
from diffusion_core.jobs.cluster.metrics import Counter, Gauge
from diffusion_core.jobs.request import Resources
from diffusion_core.jobs.transport import JobFailed
from diffusion_core.progress import ProgressEvent
from diffusion_core.stages.checks import check_services
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.stages.shard import ShardRequest, ShardResult
from diffusion_core.store import Directory
from tests.conftest import HOME
from tests.process_tree import family, kill, listening

JOBS = BackendConfig(kind=BackendKind.jobs)
TOKEN = "a-token-of-these-tests"
LONG_JOB = """
import sys
from diffusion_core.jobs import protocol
from diffusion_core.jobs.cluster.rows import on_cluster
from diffusion_core.jobs.cluster.session import ray_session
from diffusion_core.stages.shard import ShardRequest

def slow(row):
    import time
    time.sleep(1)

def run(request):
    with ray_session():
        for place, _ in on_cluster(slow, list(range(600)), request.resources):
            print("row", place, flush=True)

sys.exit(protocol.main("shard", ShardRequest, run, sys.argv[1]))
"""


@dataclass(frozen=True)
class Head:
    """A Ray head, all whose processes are below one of ours."""

    process: subprocess.Popen[bytes]
    address: str
    api: str
    metrics: str

    def kill(self) -> None:
        """As a power cut does it: no process of the cluster says good-bye."""
        kill(family(self.process.pid))
        self.process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster with a Jobs API that wants a token; the environment of this process leads there."""
    port, api, agent, exported = _free_ports(4)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs start `python`
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={api}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={exported}"]
    with open(HOME / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    started = Head(process, f"127.0.0.1:{port}", f"http://127.0.0.1:{api}", f"http://127.0.0.1:{exported}/metrics")
    try:
        _wait_for(lambda: _listens(api), 120)
        yield started
    finally:
        if process.poll() is None:
            started.kill()


@pytest.fixture
def jobs_api(head: Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.api)
    with _token(TOKEN):
        yield head


class _token:
    """This process has a token inside the block: Ray reads its environment once, unless told to look again."""

    def __init__(self, token: str | None) -> None:
        self._patch = pytest.MonkeyPatch()
        self._values = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}

    def __enter__(self) -> None:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            self._patch.delenv(name, raising=False)
        for name, value in self._values.items():
            self._patch.setenv(name, value)
        self._look_again()

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        self._look_again()

    def _look_again(self) -> None:
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def shard_request(store: str) -> ShardRequest:
    return ShardRequest(
        store=store,
        resources=Resources(workers=1),
        source=SourceConfig(kind=SourceKind.DIGITS),
        dataset=DatasetConfig(name="digits", image_size=8, channels=1),
    )


@pytest.mark.timeout(900)
def test_a_wrong_or_missing_token_is_one_sentence_before_any_job(head: Head, store: str, monkeypatch) -> None:
    for token in ("not-that-one", None):
        for variable, address in (("RAY_API_SERVER_ADDRESS", head.api), ("RAY_ADDRESS", head.address)):
            with pytest.MonkeyPatch.context() as patch, _token(token):
                patch.setenv(variable, address)
                kind = BackendKind.jobs if variable == "RAY_API_SERVER_ADDRESS" else BackendKind.local
                with pytest.raises(UserError, match=rf"{address}.*{variable}|{variable}.*{address}") as refused:
                    check_services(store, BackendConfig(kind=kind), mlflow=False)
                assert "does not accept the token of this process: set RAY_AUTH_MODE=token" in str(refused.value)
                assert "not-that-one" not in str(refused.value)
    with _token(TOKEN):
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.api)
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        check_services(store, BackendConfig(kind=BackendKind.local), mlflow=False)
    assert listening(family(head.process.pid)) == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_the_cluster(jobs_api: Head, store: str) -> None:
    events: list[ProgressEvent] = []
    started: list[JobLog] = []
    result = run_job(
        "shard", shard_request(store), ShardResult, JOBS, on_progress=events.append, on_start=started.append
    )
    assert sum(result.splits.values()) == 1797
    assert events and events[-1].stage == "shard"
    assert result.account is not None and result.account.images == 1797
    assert result.account.cpu_seconds > 0 and result.account.bytes_written > 0
    _check_metrics(jobs_api, started[0].job_id)

    with pytest.raises(UserError, match="bundle"):
        run_job("generate", GenerateRequest(store=store, model=f"{store}/nothing"), GenerateResult, JOBS)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job("shard", shard_request(f"{store}-2"), ShardResult, JOBS, on_start=started.append, on_progress=interrupt)
    assert _status(started[1].job_id) == "STOPPED"
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert started[1].job_id not in processes


def _check_metrics(head: Head, job_id: str) -> None:
    """What Prometheus finds at the node's endpoint; figures travel there within seconds."""
    wanted = {f"ray_{Counter.images}_total": 1797, f"ray_{Counter.shards}_total": 2, f"ray_{Gauge.queue_length}": 0}

    def found() -> bool:
        text = urllib.request.urlopen(head.metrics, timeout=30).read().decode()
        labelled = [line for line in text.splitlines() if f'job_id="{job_id}"' in line and 'stage="shard"' in line]
        values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in labelled}
        return wanted.items() <= values.items() and values[f"ray_{Gauge.images_per_second}"] > 0

    _wait_for(found, 30)


def _status(job_id: str) -> str:
    from ray.job_submission import JobSubmissionClient

    return str(JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"]).get_job_status(job_id).value)


@pytest.mark.timeout(900)
def test_a_job_whose_waiter_was_killed_is_stopped(jobs_api: Head, store: str) -> None:
    waiter = subprocess.Popen([sys.executable, "-c", WAITER, LONG_JOB, shard_request(store).model_dump_json()])
    try:
        _wait_for(lambda: any("log.txt" in entry.key for entry in Directory(store).list("jobs/")), 120)
        assert orphans.stop_orphans(store) == []
    finally:
        waiter.send_signal(signal.SIGKILL)
        waiter.wait()
    (orphan,) = orphans.stop_orphans(store)
    _wait_for(lambda: _status(orphan.job_id) != "RUNNING", 30)
    assert orphans.stop_orphans(store) == []


WAITER = """
import sys
from diffusion_core.jobs import backend
from diffusion_core.stages.shard import ShardRequest, ShardResult

backend.program = lambda stage, request_uri: ["-c", sys.argv[1], request_uri]
request = ShardRequest.model_validate_json(sys.argv[2])
backend.run_job("shard", request, ShardResult, backend.BackendConfig(kind="jobs"))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_that_dies_ends_the_wait_with_a_sentence(
    jobs_api: Head, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test here, for it is the last of the cluster."""
    monkeypatch.setattr(ray_jobs, "API_PATIENCE_S", 5.0)
    monkeypatch.setattr(backend, "program", lambda stage, request_uri: ["-c", LONG_JOB, request_uri])
    killed: list[float] = []

    def end_cluster(line: str) -> None:
        if line.startswith("row") and not killed:
            killed.append(time.monotonic())
            jobs_api.kill()

    started: list[JobLog] = []
    with pytest.raises(JobFailed, match=r"gives no news of .*\. If the cluster is gone, running it again on the next"):
        run_job("shard", shard_request(store), ShardResult, JOBS, on_line=end_cluster, on_start=started.append)
    assert killed and time.monotonic() - killed[0] < 60
    assert not Directory(started[0].uri).exists("running.json")
