"""The long-lived local stack: queues, a final state for every run, a closed Ray head, and its own end.

Comes after `test_browser.py`, which uses the same stack. The tests of this file rely on their order.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_core.data.shards import Batch, write_dataset
from diffusion_core.networks.config import UNetConfig
from diffusion_core.stages.generate import GenerateRequest
from diffusion_core.stages.train import TrainRequest
from diffusion_core.store import Directory
from diffusion_core.training.config import TrainingConfig
from diffusion_core.training.run import TrainSpec
from tests.local_stack import Api, LocalStack, alive, diffusion, free_port, processes_about, run, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent.parent
INTERNAL = {"asked_by", "asked", "bundle_uri"}  # what requests tell each other, and no form asks
QUEUES = {
    "shard-dataset/shard-dataset": "default",
    "train-model/train-model": "training",
    "evaluate-model/evaluate-model": "default",
    "compare-samplers/compare-samplers": "default",
    "export-average/export-average": "default",
    "register-model/register-model": "default",
    "generate-images/generate-images": "generation",
    "diffusion-pipeline/pipeline": "training",
    "generate-images/generate-from-champion": "generation",
    "diffusion-pipeline/digits": "training",
    "diffusion-pipeline/fashion-mnist": "training",
    "diffusion-pipeline/cifar10": "training",
}


@pytest.fixture(scope="module")
def store(stack: LocalStack) -> str:
    return stack.store


@pytest.fixture(scope="module")
def api(stack: LocalStack) -> Api:
    return stack.api


@pytest.fixture(scope="module")
def training(store: str) -> dict[str, Any]:
    """Parameters of a training that would take hours."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    dataset = write_dataset(store, "toy", {"train": Batch(images)})
    request = TrainRequest(
        store=store,
        spec=TrainSpec(
            dataset_uri=dataset.uri,
            network=UNetConfig(base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1, head_channels=8),
            training=TrainingConfig(
                batch_size=8, microbatch_size=4, images=10_000_000, checkpoint_every_images=64, preview_every_images=0
            ),
        ),
    )
    return {"request": request.model_dump(mode="json", exclude=INTERNAL)}


def test_up_twice_is_one_stack_and_its_deployments_have_queues(stack: LocalStack, api: Api, store: str) -> None:
    services = stack.services
    assert list(services) == ["prefect", "mlflow", "ray", "worker", "watcher"]
    with urllib.request.urlopen(f"{services['mlflow']['url']}/health", timeout=10) as answer:
        assert answer.status == 200
    served = api.deployments()
    assert QUEUES.items() <= {name: item["work_queue_name"] for name, item in served.items()}.items()
    assert served["diffusion-pipeline/digits"]["parameters"]["config"]["network"]["channel_multipliers"] == [1, 2]

    digits = f"deployments/{served['diffusion-pipeline/digits']['id']}"
    _check_that_schedules_make_runs(api, digits)
    api(digits, {"tags": ["restart-after-crash"]}, "PATCH")
    assert {name: service["pid"] for name, service in stack.up().items()} == {
        name: service["pid"] for name, service in services.items()
    }
    assert "restart-after-crash" in api(digits)["tags"]
    shown = run("stack", "status", "--store", store)
    assert shown.returncode == 0 and f"recorded in sqlite:///{Directory(store).local_path}/mlflow.db" in shown.stdout


def _check_that_schedules_make_runs(api: Api, deployment: str) -> None:
    """A schedule that begins far from now, so that its runs are made and none of them starts."""
    later = {"interval": 3600, "anchor_date": "2020-01-01T00:30:00Z", "timezone": "UTC"}
    schedule = api(f"{deployment}/schedules", [{"active": True, "schedule": later}])[0]
    scheduled = {"type": {"any_": ["SCHEDULED"]}}
    ours = {"flow_runs": {"deployment_id": {"any_": [deployment.split("/")[1]]}, "state": scheduled}}
    runs = wait_for(lambda: api("flow_runs/filter", ours), "runs of the schedule", 120)
    assert all(run["auto_scheduled"] and run["created_by"]["type"] == "SCHEDULE" for run in runs)
    api(f"{deployment}/schedules/{schedule['id']}", method="DELETE")
    wait_for(lambda: not api("flow_runs/filter", ours), "the end of the scheduled runs")


def test_other_ports_and_taken_ports_are_one_sentence(stack: LocalStack, store: str, tmp_path: Path) -> None:
    port = stack.services["prefect"]["url"].rpartition(":")[2]
    refused = run("stack", "up", "--store", store, "--prefect-port", free_port())
    assert refused.returncode == 2 and f"runs on port {port} already" in refused.stderr
    other = tmp_path / "other"
    refused = run("stack", "up", "--store", str(other), "--prefect-port", free_port(), "--mlflow-port", port)
    assert refused.returncode == 2 and f"port {port} is taken by the stack of the store {store}" in refused.stderr
    assert refused.stderr.count("\n") == 1 and not (other / "stack").exists(), "something was started"


def test_everything_listens_on_loopback_and_ray_wants_its_token(stack: LocalStack, store: str) -> None:
    sessions = {str(service["pid"]) for service in stack.services.values()}
    shown = subprocess.run(["ps", "-eo", "pid=,sid="], capture_output=True, text=True, check=True).stdout
    ours = {pid for pid, session in map(str.split, shown.splitlines()) if session in sessions}
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    addresses = [line.split()[3] for line in listening if ours & set(re.findall(r"pid=(\d+)", line))]
    assert len(addresses) > 8
    assert {address.rpartition(":")[0] for address in addresses} <= {"127.0.0.1", "[::ffff:127.0.0.1]"}

    token = Directory(store).local_path / "stack" / "ray-token"
    assert token.stat().st_mode & 0o777 == 0o600
    jobs = f"{stack.services['ray']['url']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(jobs, timeout=10)
    allowed = urllib.request.Request(jobs, headers={"Authorization": f"Bearer {token.read_text()}"})
    with urllib.request.urlopen(allowed, timeout=10) as answer:
        assert answer.status == 200


def _checkpoints(runs: Directory, others: tuple[str, ...]) -> list[str]:
    """The files of checkpoints, but those of `others`."""
    return [entry.key for entry in runs.list() if "/checkpoints/" in entry.key and not entry.key.startswith(others)]


def test_generation_starts_during_a_training_and_a_cancel_needs_no_worker(
    stack: LocalStack, api: Api, store: str, training: dict[str, Any]
) -> None:
    runs = Directory(store) / "runs"
    others = tuple(runs.children())
    trained = api.start("train-model/train-model", training)
    wait_for(lambda: _checkpoints(runs, others), "a checkpoint", 180)
    assert processes_about(f"{store}/jobs/train-")

    asked_at = time.monotonic()
    request = GenerateRequest(store=store, model="models:/nothing/1")
    generated = api.start(
        "generate-images/generate-images", {"request": request.model_dump(mode="json", exclude=INTERNAL)}
    )
    api.wait_for(generated, "RUNNING", "FAILED", seconds=60)
    print(f"the generation started after {time.monotonic() - asked_at:.1f} s")
    assert api.run(trained)["state"]["type"] == "RUNNING"

    os.kill(stack.services["worker"]["pid"], signal.SIGKILL)
    assert run("stack", "status", "--store", store).returncode == 1
    api(f"flow_runs/{trained}/set_state", {"state": {"type": "CANCELLING"}})
    api.wait_for(trained, "CANCELLED", seconds=60)
    assert processes_about(f"{store}/jobs/") == []


def test_a_killed_run_is_crashed_with_its_reason_and_starts_again_if_asked(
    stack: LocalStack, api: Api, store: str, training: dict[str, Any]
) -> None:
    stack.up()
    killed = api.start("train-model/train-model", training, tags=("restart-after-crash",))
    api.wait_for(killed, "RUNNING")
    wait_for(lambda: processes_about(f"{store}/jobs/train-"), "the job")
    pid = api.run(killed)["labels"]["diffusion.pid"]
    for victim in (stack.services["worker"]["pid"], pid):
        os.kill(victim, signal.SIGKILL)
    state = api.wait_for(killed, "CRASHED", seconds=60)["state"]
    assert f"pid {pid}" in state["message"]
    wait_for(lambda: not processes_about(f"{store}/jobs/"), "the end of the job", 60)

    stack.up()
    (again,) = (run for run in api("flow_runs/filter", {}) if run["labels"].get("diffusion.restarts"))
    assert again["parameters"] == api.run(killed)["parameters"]
    api.wait_for(again["id"], "RUNNING")
    wait_for(lambda: processes_about(f"{store}/jobs/train-"), "the job")
    api(f"flow_runs/{again['id']}/set_state", {"state": {"type": "CANCELLING"}})
    api.wait_for(again["id"], "CANCELLED", seconds=60)
    assert processes_about(f"{store}/jobs/") == []


def test_prefect_deploy_makes_the_same_deployments(api: Api, stack: LocalStack, store: str) -> None:
    before = api.deployments()
    environment = {**os.environ, "PREFECT_API_URL": f"{stack.services['prefect']['url']}/api", "DIFFUSION_STORE": store}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    command += ["--prefect-file", str(ROOT / "infra" / "prefect.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    after = api.deployments()
    for name, queue in QUEUES.items():
        assert after[name]["work_queue_name"] == queue and after[name]["entrypoint"] == before[name]["entrypoint"]
    assert after["diffusion-pipeline/digits"]["parameters"]["config"]["store"] == store

    request = GenerateRequest(store=store, model="models:/nothing/1")
    refused = api.start(
        "generate-images/generate-images", {"request": request.model_dump(mode="json", exclude=INTERNAL)}
    )
    assert "nothing" in api.wait_for(refused, "FAILED")["state"]["message"]


def test_down_ends_what_is_going_and_says_why(
    stack: LocalStack, api: Api, store: str, training: dict[str, Any]
) -> None:
    going = api.start("train-model/train-model", training)
    api.wait_for(going, "RUNNING")
    wait_for(lambda: processes_about(f"{store}/jobs/train-"), "the job")
    running = diffusion("stack", "status", "--store", store)
    ended = stack.down()
    assert {service["name"] for service in ended} == {"prefect", "mlflow", "ray", "worker", "watcher"}
    assert not any(alive(service["pid"]) for service in running)
    assert processes_about(store) == []
    assert diffusion("stack", "status", "--store", store) == []
    with sqlite3.connect(Directory(store).local_path / "stack" / "prefect.db") as database:
        states = database.execute(
            "select type, message from flow_run_state where flow_run_id = ? order by timestamp", [going]
        ).fetchall()
    assert states[-1][0] == "CRASHED" and "taken down" in states[-1][1]
