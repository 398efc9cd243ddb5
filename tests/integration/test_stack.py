"""The long-lived local stack: it serves the deployments, a cancelled flow ends its job, and the stack itself ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from diffusion_core.data.shards import Batch, write_dataset
from diffusion_core.networks.config import UNetConfig
from diffusion_core.stages.train import TrainRequest
from diffusion_core.store import Directory
from diffusion_core.training.config import TrainingConfig
from diffusion_core.training.run import TrainSpec

DEPLOYMENTS = {
    "shard-dataset/shard-dataset",
    "train-model/train-model",
    "evaluate-model/evaluate-model",
    "compare-samplers/compare-samplers",
    "export-average/export-average",
    "generate-images/generate-images",
    "register-model/register-model",
    "diffusion-pipeline/digits",
    "diffusion-pipeline/fashion-mnist",
    "diffusion-pipeline/cifar10",
}


def diffusion(*arguments: str) -> Any:
    """Run the command in a process of its own and return the JSON that it prints."""
    command = [sys.executable, "-m", "flows.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
    return answer


def alive(pid: int) -> bool:
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(shown.strip()) and not shown.startswith("Z")


def processes_about(word: str) -> list[int]:
    """Processes of this machine whose command line has `word` in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and folder.name != str(os.getpid()):
            try:
                if word in (folder / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(folder.name))
            except OSError:  # it ended while we looked
                continue
    return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Api:
    """Prefect's HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/api/{path}", data, headers, method=method)
        for attempt in Retrying(retry=retry_if_exception(_is_busy), stop=stop_after_delay(60), wait=wait_fixed(1)):
            with attempt, urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "null")


def _is_busy(error: BaseException) -> bool:
    """Prefect answers 503 while its database is locked, and its own clients ask again then."""
    return isinstance(error, urllib.error.HTTPError) and error.code == 503


@pytest.fixture
def stack(store: str, ray_cluster: object) -> Iterator[dict[str, dict[str, Any]]]:
    """The services of a stack, which is down again afterwards."""
    prefect_port, mlflow_port = (free_port(), free_port())
    try:
        started = diffusion(
            "stack", "up", "--store", store, "--prefect-port", prefect_port, "--mlflow-port", mlflow_port
        )
        yield {service["name"]: service for service in started}
    finally:
        diffusion("stack", "down", "--store", store)


def train_request(store: str) -> TrainRequest:
    """A training that would take hours."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    dataset = write_dataset(store, "toy", {"train": Batch(images)})
    spec = TrainSpec(
        dataset_uri=dataset.uri,
        network=UNetConfig(base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1, head_channels=8),
        training=TrainingConfig(
            batch_size=8, microbatch_size=4, images=10_000_000, checkpoint_every_images=64, preview_every_images=0
        ),
    )
    return TrainRequest(store=store, spec=spec)


@pytest.mark.timeout(420)
@pytest.mark.slow
def test_up_cancel_down(stack: dict[str, dict[str, Any]], store: str) -> None:
    assert set(stack) == {"prefect", "mlflow", "deployments"}
    again = diffusion("stack", "up", "--store", store)
    assert {service["pid"] for service in again} == {service["pid"] for service in stack.values()}
    assert all(service["alive"] for service in diffusion("stack", "status", "--store", store))
    with urllib.request.urlopen(f"{stack['mlflow']['url']}/health", timeout=10) as answer:
        assert answer.status == 200

    api = Api(stack["prefect"]["url"])
    served = wait_for(lambda: _all_deployments(api), "the deployments")
    assert served["diffusion-pipeline/digits"]["parameters"]["config"]["network"]["channel_multipliers"] == [1, 2]

    _check_that_schedules_make_runs(api, served["diffusion-pipeline/digits"]["id"])

    request = train_request(store)
    parameters = {"request": request.model_dump(mode="json")}
    deployment = served["train-model/train-model"]["id"]
    run = api(f"deployments/{deployment}/create_flow_run", {"parameters": parameters, "state": {"type": "SCHEDULED"}})
    checkpoints = Directory(store) / "runs"
    wait_for(lambda: any("checkpoints/" in entry.key for entry in checkpoints.list()), "a checkpoint", 180)
    jobs = wait_for(lambda: processes_about(f"{store}/jobs/train-"), "the job")
    logs = api("logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert any("train" in log["message"] for log in logs)

    api(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for(lambda: api(f"flow_runs/{run['id']}")["state"]["type"] == "CANCELLED", "the cancelled state", 120)
    wait_for(lambda: not any(map(alive, jobs)), "the end of the job", 60)
    assert processes_about(store + "/jobs/") == []

    ended = diffusion("stack", "down", "--store", store)
    assert {service["name"] for service in ended} == set(stack)
    assert not any(alive(service["pid"]) for service in stack.values())
    assert diffusion("stack", "status", "--store", store) == []


def _check_that_schedules_make_runs(api: Api, deployment: str) -> None:
    """A schedule that begins far from now, so that its runs are made and none of them starts."""
    later = {"interval": 3600, "anchor_date": "2020-01-01T00:30:00Z", "timezone": "UTC"}
    schedule = api(f"deployments/{deployment}/schedules", [{"active": True, "schedule": later}])[0]
    ours = {"flow_runs": {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": ["SCHEDULED"]}}}}
    runs = wait_for(lambda: api("flow_runs/filter", ours), "runs of the schedule", 120)
    assert all(run["auto_scheduled"] and run["created_by"]["type"] == "SCHEDULE" for run in runs)
    api(f"deployments/{deployment}/schedules/{schedule['id']}", method="DELETE")
    wait_for(lambda: not api("flow_runs/filter", ours), "the end of the scheduled runs")


def _all_deployments(api: Api) -> dict[str, Any] | None:
    flows = {flow["id"]: flow["name"] for flow in api("flows/filter", {})}
    found = {f"{flows[item['flow_id']]}/{item['name']}": item for item in api("deployments/filter", {})}
    return found if set(found) >= DEPLOYMENTS else None
