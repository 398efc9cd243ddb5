"""Whatever kills a training job or its workers: running it again ends with the same images and bit-equal weights."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from diffusion_core.training import open_run, train
from diffusion_core.training.checkpoint import checkpoints
from tests.toy_training import (
    assert_same_weights,
    finished_job,
    run_world,
    start_job,
    toy_dataset,
    toy_request,
    toy_spec,
)

IMAGES, CHECKPOINT = 1200, 100
LENGTH = {"images": IMAGES, "checkpoint_every_images": CHECKPOINT, "log_every_images": 300}


def train_in_world(world, dataset, store):
    spec = toy_spec(dataset, **LENGTH)
    train(spec, open_run(store, spec), world)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The same run in two processes that nothing disturbs. (That Ray trains the same is tested elsewhere.)"""
    store = str(tmp_path_factory.mktemp("undisturbed"))
    run_world(2, train_in_world, dataset, store)
    return open_run(store, toy_spec(dataset, **LENGTH))


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def worker(run, rank: int, attempt: int = 1) -> int:
    return int(run.attempts.read_json(f"{attempt}.worker-{rank}.json")["pid"])


def begin(folder, store, spec, images=2 * CHECKPOINT, attempt=1, **resources):
    """Start the job and wait until it has a checkpoint at `images`; returns it and its workers' process ids."""
    run = open_run(store, spec)
    job = start_job(folder, toy_request(store, spec, workers=2, **resources))
    wait_for(lambda: (checkpoints(run.checkpoints) or [0])[-1] >= images or job.poll() is not None)
    assert job.poll() is None, job.communicate()[0]
    return job, [worker(run, rank, attempt) for rank in (0, 1)]


def check_result(folder, run, undisturbed):
    result = json.loads((folder / "result.json").read_text())
    assert result["images_seen"] == IMAGES
    assert_same_weights(run, undisturbed)
    check_record(run, result)


def check_record(run, result):
    """No step is recorded twice, and none is missing."""
    from mlflow import MlflowClient

    from diffusion_core.tracking import tracking_uri

    client = MlflowClient(tracking_uri(run.directory.uri.split("/runs/")[0]))
    steps = [metric.step for metric in client.get_metric_history(result["mlflow_run_id"], "loss")]
    assert steps == sorted(set(steps)) and steps[-1] == IMAGES
    assert set(range(CHECKPOINT, IMAGES + 1, CHECKPOINT)) <= set(steps)


@pytest.mark.timeout(900)  # three jobs, each with a Ray of its own
def test_the_job_is_interrupted_killed_and_run_again(dataset, undisturbed, tmp_path):
    """Each job has its own local Ray, which must end with it."""
    store, spec = str(tmp_path / "store"), toy_spec(dataset, **LENGTH)
    run = open_run(store, spec)
    job, workers = begin(tmp_path / "first", store, spec)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
    output = check_end(job, workers, tmp_path / "first")
    assert run.attempts.read_json("1.end.json") == {"outcome": "failed"}
    assert job.returncode == 128 + signal.SIGINT and "Traceback" not in output
    reached = checkpoints(run.checkpoints)[-1]
    assert reached % CHECKPOINT, "a checkpoint was saved out of turn before it ended"

    job, workers = begin(tmp_path / "second", store, spec, images=reached + 2 * CHECKPOINT, attempt=2)
    job.kill()
    check_end(job, workers, tmp_path / "second")
    assert not run.attempts.exists("2.end.json")
    assert run.finished(spec.training) is None

    status, output, _ = finished_job(tmp_path / "third", toy_request(store, spec, workers=2))
    assert status == 0, output
    check_result(tmp_path / "third", run, undisturbed)
    assert run.attempts.exists("3.json") and not run.attempts.exists("4.json")


def check_end(job, workers, folder):
    """The job ends without a result, and its workers with it; what it said."""
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0, output
    assert not (folder / "result.json").exists()
    wait_for(lambda: not any(map(is_alive, workers)), 30)
    return output


@pytest.mark.slow
def test_a_killed_worker_costs_only_the_way_back(ray_cluster, dataset, undisturbed, tmp_path):
    """Inside one attempt, whichever worker it is: the group starts again at the newest checkpoint."""
    store, spec = str(tmp_path / "store"), toy_spec(dataset, **LENGTH)
    run = open_run(store, spec)
    job, workers = begin(tmp_path / "job", store, spec, max_failures=2)
    for rank in (0, 1):
        kill_worker(job, run, workers, rank)
        workers = [worker(run, 0), worker(run, 1)]
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    check_result(tmp_path / "job", run, undisturbed)
    assert not run.attempts.exists("2.json")


def kill_worker(job, run, workers, rank):
    """Kill it, and wait until the group that takes the place of these workers has come further."""
    reached = checkpoints(run.checkpoints)[-1]
    os.kill(workers[rank], signal.SIGKILL)

    def further() -> bool:
        replaced = not {worker(run, 0), worker(run, 1)} & set(workers)
        return replaced and checkpoints(run.checkpoints)[-1] > reached

    wait_for(lambda: further() or job.poll() is not None)
    assert job.poll() is None, job.communicate()[0]


@pytest.mark.slow
def test_workers_that_die_too_often_end_the_job(ray_cluster, dataset, tmp_path):
    store, spec = str(tmp_path / "store"), toy_spec(dataset, **LENGTH)
    job, workers = begin(tmp_path / "job", store, spec, max_failures=0)
    os.kill(workers[1], signal.SIGKILL)
    output, _ = job.communicate(timeout=90)
    assert job.returncode == 1
    assert "Workers failed more than 0 times (resources.max_failures)" in output


def test_a_loss_that_is_not_finite_ends_the_job_at_once_with_its_sentence(ray_cluster, dataset, tmp_path):
    absurd = {"learning_rate": 1.0, "weight_decay": 10.0, "grad_clip": None, "warmup_images": 0, "images": 100_000}
    request = toy_request(str(tmp_path / "store"), toy_spec(dataset, **absurd), workers=2)
    status, output, _ = finished_job(tmp_path / "job", request)
    assert status == 2, output
    sentence = json.loads((tmp_path / "job" / "error.json").read_text())["error"]
    assert "no longer finite" in sentence and "training.learning_rate" in sentence
    assert output.count("Traceback") == 0


@pytest.mark.slow
def test_damaged_data_end_the_job_with_their_sentence(ray_cluster, tmp_path):
    """One worker after the other finds it; the error is not retried for long, and it is told."""
    uri = toy_dataset(str(tmp_path / "data"))
    shard = Path(uri, "shards", "part-00002.parquet")
    shard.write_bytes(shard.read_bytes()[:100])
    request = toy_request(str(tmp_path / "store"), toy_spec(uri), workers=2)
    status, output, _ = finished_job(tmp_path / "job", request)
    assert status == 2, output
    assert "part-00002.parquet" in json.loads((tmp_path / "job" / "error.json").read_text())["error"]
