"""Jobs through the Ray Jobs API of a real cluster: the same lines, results and sentences, and a stop that arrives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from diffusion_core.config import UserError
from diffusion_core.data.config import DatasetConfig, SourceConfig, SourceKind
from diffusion_core.jobs.backend import BackendConfig, BackendKind, JobLog, run_job
from diffusion_core.jobs.request import Resources
from diffusion_core.progress import ProgressEvent
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.stages.shard import ShardRequest, ShardResult
from tests.conftest import start_ray

JOBS = BackendConfig(kind=BackendKind.jobs)


@pytest.fixture(scope="module")
def jobs_api() -> Iterator[None]:
    """A cluster with a Jobs API, which RAY_API_SERVER_ADDRESS names."""
    port, agent_port = _free_ports(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # jobs start `python`
        options = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        options |= {"dashboard_agent_listen_port": agent_port}  # another cluster of this machine may have the usual one
        cluster = start_ray([{"num_cpus": 2, **options}])
        patch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        try:
            yield
        finally:
            cluster.shutdown()


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_on_the_cluster(jobs_api: None, store: str) -> None:
    events: list[ProgressEvent] = []
    result = run_job("shard", shard_request(store), ShardResult, JOBS, on_progress=events.append)
    assert sum(result.splits.values()) == 1797
    assert events and events[-1].stage == "shard"

    with pytest.raises(UserError, match="bundle"):
        run_job("generate", GenerateRequest(store=store, model=f"{store}/nothing"), GenerateResult, JOBS)

    started: list[JobLog] = []

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job("shard", shard_request(f"{store}-2"), ShardResult, JOBS, on_start=started.append, on_progress=interrupt)
    from ray.job_submission import JobSubmissionClient

    assert JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"]).get_job_status(started[0].job_id) == "STOPPED"
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert started[0].job_id not in processes
