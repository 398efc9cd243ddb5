"""The train job on a real Ray cluster: two gloo workers, one node or two, too few resources, two triggers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from diffusion_core.bundle import load_bundle
from diffusion_core.progress import parse_progress
from diffusion_core.store import Directory
from diffusion_core.training import open_run, train
from tests.conftest import start_ray
from tests.toy_training import (
    assert_same_weights,
    finished_job,
    run_world,
    start_job,
    toy_dataset,
    toy_request,
    toy_spec,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(str(tmp_path_factory.mktemp("data")))


def train_in_world(world, dataset, store, changes):
    spec = toy_spec(dataset, **changes)
    train(spec, open_run(store, spec), world)


@pytest.mark.slow
def test_two_workers_train_what_two_processes_without_ray_train(ray_cluster, dataset, tmp_path):
    store, other = str(tmp_path / "store"), str(tmp_path / "without-ray")
    spec = toy_spec(dataset)
    status, output, _ = finished_job(tmp_path / "first", toy_request(store, spec, workers=2))
    assert status == 0, output
    assert "Traceback" not in output and "ERROR" not in output, output
    events = [event for event in map(parse_progress, output.splitlines()) if event]
    assert events and events[-1].done == 200 and "loss" in events[-1].figures
    result = json.loads((tmp_path / "first" / "result.json").read_text())
    assert result["images_seen"] == 200 and result["reused"] is False
    assert result["account"]["images"] == 200 and result["account"]["cpu_seconds"] > 0
    about = json.loads((tmp_path / "first" / "ids.json").read_text())
    assert (about["run_id"], about["mlflow_run_id"]) == (result["run_id"], result["mlflow_run_id"])
    assert load_bundle(result["bundle_uri"]).config.mlflow_run_id == result["mlflow_run_id"]

    run_world(2, train_in_world, dataset, other, {})
    assert_same_weights(open_run(store, spec), open_run(other, spec))
    check_record(store, result)
    check_second_time(tmp_path, store, spec, result)


def check_record(store, result):
    """MLflow has each figure once, in order, and the pictures."""
    from mlflow import MlflowClient

    from diffusion_core.tracking import tracking_uri

    client = MlflowClient(tracking_uri(store))
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["run_id"] == result["run_id"]
    for figure in ("loss", "grad_norm", "images_per_second", "data_wait_share", "learning_rate"):
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, figure)]
        assert steps == [40, 50, 80, 100, 120, 150, 160, 200], figure
    assert [file.path for file in client.list_artifacts(run.info.run_id, "images")] == ["images/samples.png"]


def check_second_time(tmp_path, store, spec, result):
    """A finished run is answered at once and without a cluster."""
    request = toy_request(store, spec, workers=50)
    status, output, seconds = finished_job(tmp_path / "second", request, RAY_ADDRESS="127.0.0.1:1")
    assert status == 0, output
    again = json.loads((tmp_path / "second" / "result.json").read_text())
    assert again["reused"] is True and seconds < 10
    same = {"seconds": 0, "reused": 0, "job": "", "account": None}
    assert {**again, **same} == {**result, **same} and again["account"]["images"] == 0


@pytest.mark.slow
def test_two_triggers_at_once_train_once(ray_cluster, dataset, tmp_path):
    store = str(tmp_path / "store")
    spec = toy_spec(dataset, images=600)
    request = toy_request(store, spec, workers=2)
    jobs = [start_job(tmp_path / name, request) for name in ("one", "other")]
    outputs = [job.communicate(timeout=160)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "other")]
    assert sorted(result["reused"] for result in results) == [False, True]
    assert len({(result["bundle_uri"], result["images_seen"], result["loss"]) for result in results}) == 1
    attempts = open_run(store, spec).attempts
    assert attempts.read_json("1.end.json") == {"outcome": "ok"}
    assert not attempts.exists("2.json"), "the second trigger only watched"
    watcher = outputs[[result["reused"] for result in results].index(True)]
    assert any(parse_progress(line) for line in watcher.splitlines()), "it shows the progress of the first"


def test_workers_land_on_both_nodes_and_a_small_cluster_is_named(dataset, tmp_path):
    cluster = start_ray([{"num_cpus": 1}, {"num_cpus": 1}])
    try:
        store = str(tmp_path / "store")
        spec = toy_spec(dataset, images=50)
        status, output, _ = finished_job(
            tmp_path / "fits", toy_request(store, spec, workers=2), RAY_ADDRESS=cluster.address
        )
        assert status == 0, output
        attempts = open_run(store, spec).attempts
        nodes = {attempts.read_json(f"1.worker-{rank}.json")["node"] for rank in (0, 1)}
        assert len(nodes) == 2, "both workers are on one node"

        more = toy_spec(dataset, images=100)
        for resources, named in (
            ({"workers": 3}, "3 CPU needed, 2 there"),
            ({"workers": 1, "cpus_per_worker": 2}, "2 CPU"),
            ({"workers": 2, "gpus_per_worker": 1}, "2 GPU needed, 0 there"),
            ({"workers": 2, "accelerator_type": "H100"}, "accelerator_type:H100"),
        ):
            request = toy_request(store, more, **resources, start_timeout_s=2)
            status, output, seconds = finished_job(tmp_path / "small", request, RAY_ADDRESS=cluster.address)
            sentence = json.loads((tmp_path / "small" / "error.json").read_text())["error"]
            assert status == 2 and named in sentence, output
            assert seconds < 40
    finally:
        cluster.shutdown()


def test_resources_that_others_hold_are_named(ray_cluster, dataset, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, ray_cluster.address], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and "held" in holder.stdout.readline()
        request = toy_request(str(tmp_path / "store"), toy_spec(dataset), workers=2, start_timeout_s=6)
        status, output, seconds = finished_job(tmp_path / "job", request)
        assert status == 2, output
        sentence = json.loads((tmp_path / "job" / "error.json").read_text())["error"]
        assert "2 CPU needed, 1 of 2 free" in sentence and "start_timeout_s = 6" in sentence
        assert seconds < 60
    finally:
        holder.kill()
        holder.wait()


HOLD = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1)
class Holder:
    def ready(self): return True
holder = Holder.remote()
ray.get(holder.ready.remote())
print("held", flush=True)
time.sleep(120)
"""


def test_torchrun_and_the_plain_module_need_no_ray_and_no_mlflow(dataset, tmp_path):
    """`python -m diffusion_core.training` and torchrun, where importing ray, mlflow or prefect is an error."""
    blocked = tmp_path / "blocked"
    for name in ("ray", "mlflow", "prefect"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ImportError('{name} is not here')")
    environment = {**os.environ, "PYTHONPATH": f"{blocked}:{os.environ['PYTHONPATH']}"}
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    spec = toy_spec(dataset, images=100)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffusion_core.training"]
    for store, command in ((one, ["-m", "diffusion_core.training"]), (two, torchrun)):
        path = tmp_path / "request.json"
        path.write_text(json.dumps(toy_request(store, spec, workers=2)))
        done = subprocess.run(
            [sys.executable, *command, str(path)], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout[done.stdout.index("{") :])
        assert answer["images_seen"] == 100 and load_bundle(answer["bundle_uri"]).digest == answer["bundle_digest"]
        assert Directory(answer["run_uri"]).exists("metrics.jsonl")
        assert "train: 100 of 100 images" in done.stdout
