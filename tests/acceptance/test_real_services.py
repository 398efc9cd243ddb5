"""The whole pipeline on real services: S3, MLflow over HTTP, two raylets behind the Jobs API with a token, Prefect.

Everything is started through Prefect's API, as its UI does, and read with plain clients afterwards. One stack serves
all tests of this file, in their order.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.fs import S3FileSystem

from diffusion_core.stages.settings import as_values, load_config
from tests import tiny_pipeline
from tests.chaos import generation, training
from tests.conftest import HOME
from tests.local_stack import LocalStack, wait_for
from tests.process_tree import family, kill
from tests.relay import Relay
from tests.swift_server import ACCESS_KEY, SECRET_KEY, SwiftServer
from tests.tiny_bundle import tiny_bundle
from tests.toy_training import toy_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SECOND = "SECOND"  # what only the second raylet has
BROKEN = {"circle/017.png": "truncated", "circle/055.jpg": "empty", "square/101.png": "no picture"}
COUNT = 24
SETTINGS = [
    *tiny_pipeline.SETTINGS,
    "name=shapes",
    "backend.kind=jobs",
    "dataset.image_size=16",
    "dataset.channels=1",
    "network.channel_multipliers=[1,2]",
    "training.batch_size=64",
    "training.microbatch_size=32",
    "evaluation.samples=20",
    "evaluation.kid_subset_size=10",
    f"generation.count={COUNT}",
    "generation.images_per_shard=8",
    f"resources.generate.accelerator_type={SECOND}",
]


@dataclass(frozen=True)
class Services:
    """The stack, the network between it and S3, and how a user's own clients reach everything."""

    stack: LocalStack
    bucket: str
    network: Relay
    s3: SwiftServer

    @property
    def store(self) -> str:
        return self.stack.store

    @property
    def folder(self) -> Path:
        """Where the stack keeps its databases, logs and the token."""
        return Path(self.stack.services["prefect"]["log"]).parent

    def start(self, deployment: str, **parameters: Any) -> str:
        return self.stack.api.start(deployment, parameters)

    def sentence(self, run_id: str) -> str:
        """What a run says that failed."""
        return str(self.stack.api.wait_for(run_id, "FAILED", seconds=300)["state"]["message"])


@pytest.fixture(scope="module")
def services(s3_server: SwiftServer) -> Iterator[Services]:
    bucket, network = "real-services", Relay(int(s3_server.endpoint.rpartition(":")[2]))
    s3_server.make_bucket(bucket)
    reached = s3_server.environment
    reached |= {name: f"http://{network.address}" for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in reached.items():
            patch.setenv(name, value)
        stack = LocalStack(f"s3://{bucket}/store", "--ray")
        second = None
        try:
            stack.up()
            second = _second_raylet(stack.services["ray"])
            yield Services(stack, bucket, network, s3_server)
        finally:
            if second:
                kill(family(second.pid))
                second.wait()
            stack.down()


def _second_raylet(head: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Joins the head as a node of its own; with the token, for it is not let in without."""
    environment = {**os.environ, **head["offers"], "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", RAYLET, head["offers"]["RAY_ADDRESS"]]
    with open(HOME / "second.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    wait_for(lambda: "joined" in (HOME / "second.log").read_text(), "the second raylet", 300)
    return process


# As `ray start --address` does it, which gives up 127.0.0.1 for the address of a network interface.
RAYLET = f"""
import sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams

parameters = RayParams(
    gcs_address=sys.argv[1],
    node_ip_address="127.0.0.1",
    num_cpus=2,
    resources={{"accelerator_type:{SECOND}": 1}},
    object_store_memory=150 * 2**20,
    min_worker_port=0,
    max_worker_port=0,
    include_log_monitor=False,
    node_manager_port=0,
    dashboard_agent_listen_port=None,
)
node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
print("joined", flush=True)
time.sleep(10**6)
"""


def test_a_folder_on_s3_becomes_an_image_set_on_s3(services: Services) -> None:
    plain = services.s3.client
    for key, data in _pictures().items():
        plain.put_object(Bucket=services.bucket, Key=f"pictures/{key}", Body=data)
    shortcuts = {"store": services.store, "source.uri": f"s3://{services.bucket}/pictures"}
    config = as_values(load_config(settings=SETTINGS, shortcuts=shortcuts))
    ended = services.stack.api.wait_for(
        services.start("diffusion-pipeline/digits", config=config), "COMPLETED", "FAILED", "CRASHED", seconds=1200
    )
    assert ended["state"]["type"] == "COMPLETED", ended["state"]["message"]
    _check_dataset(services)
    _check_model(services)
    _check_images(services)
    assert _leaks(services) == []


def _check_dataset(services: Services) -> None:
    (manifest,) = (key for key in _keys(services, "datasets/shapes/") if key.endswith("/manifest.json"))
    assert json.loads(_object(services, manifest))["class_names"] == ["circle", "square"]
    place = manifest.rpartition("/")[0]
    rejected = _table(services, f"{place}/rejected.parquet").to_pylist()
    assert {row["key"] for row in rejected} == set(BROKEN) and all(row["reason"] for row in rejected)
    shards = [key for key in _keys(services, place.removeprefix("store/") + "/shards/") if key.endswith(".parquet")]
    assert sum(_table(services, key).num_rows for key in shards) == 197


def _check_model(services: Services) -> None:
    """The bundle, its figures, and the version that MLflow holds of it."""
    from mlflow import MlflowClient
    from safetensors.numpy import load

    (bundle,) = (key for key in _keys(services, "runs/") if key.endswith("/model.safetensors"))
    assert load(_object(services, bundle))
    assert json.loads(_object(services, bundle.replace("model.safetensors", "bundle.json")))["files"]
    (figures,) = (key for key in _keys(services, "evaluations/") if key.endswith("evaluation.json"))
    assert "accuracy" in json.loads(_object(services, figures))["figures"]
    registry = MlflowClient(services.stack.services["mlflow"]["url"])
    version = registry.get_model_version_by_alias("shapes", "champion")
    run = registry.get_run(version.run_id)
    assert (version.version, run.info.status) == ("1", "FINISHED") and run.data.metrics["loss"] > 0


def _check_images(services: Services) -> None:
    """Those of the request, beside those that were measured."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for key in _keys(services, "images/"):
        if re.search(r"/shards/.*\.parquet$", key):
            sets.setdefault(key.split("/")[2], []).extend(_table(services, key).to_pylist())
    (rows,) = (rows for rows in sets.values() if len(rows) == COUNT)
    assert sorted(row["image_id"] for row in rows) == list(range(COUNT))
    assert all(row["label"] == row["image_id"] % 2 for row in rows)
    with Image.open(io.BytesIO(rows[0]["image"]["bytes"])) as picture:
        assert picture.size == (16, 16)


def _keys(services: Services, prefix: str = "") -> list[str]:
    pages = services.s3.client.get_paginator("list_objects_v2")
    found = pages.paginate(Bucket=services.bucket, Prefix=f"store/{prefix}")
    return [item["Key"] for page in found for item in page.get("Contents", ())]


def _object(services: Services, key: str) -> bytes:
    data: bytes = services.s3.client.get_object(Bucket=services.bucket, Key=key)["Body"].read()
    return data


def _table(services: Services, key: str) -> Any:
    endpoint = services.s3.endpoint
    system = S3FileSystem(access_key=ACCESS_KEY, secret_key=SECRET_KEY, endpoint_override=endpoint, region="us-east-1")
    return pq.read_table(f"{services.bucket}/{key}", filesystem=system)


def _leaks(services: Services) -> list[str]:
    """Objects, databases and logs that hold a secret. Parameters, events and artifacts are rows of the databases."""
    token = services.folder / "ray-token"
    secrets = (SECRET_KEY.encode(), token.read_bytes().strip())
    files = [path for root in (services.folder, HOME / "ray") for path in root.rglob("*") if path.is_file()]
    texts = {str(path): path.read_bytes() for path in files if path != token}
    assert {"prefect.db", "mlflow.db", "worker.log", "raylet.out"} <= {Path(name).name for name in texts}
    texts |= {key: _object(services, key) for key in _keys(services)}
    return [name for name, text in texts.items() if any(secret in text for secret in secrets)]


def test_a_network_that_was_cut_costs_time_and_a_cancel_ends_all(services: Services) -> None:
    store, api = services.store, services.stack.api
    toy_dataset(store)
    request = training(store)
    request["spec"]["training"]["images"] = 10_000_000
    run_id = services.start("train-model/train-model", request=request, backend={"kind": "jobs"})

    def newest() -> int:
        return max((int(found[1]) for key in _keys(services, "runs/") if (found := CHECKPOINT.search(key))), default=0)

    known = newest()
    before = wait_for(lambda: (now := newest()) > known and now, "a checkpoint", 300)
    services.network.cut()
    time.sleep(15)
    services.network.mend()
    wait_for(lambda: newest() > before + 200, "progress after the cut", 300)

    api(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    api.wait_for(run_id, "CANCELLED", seconds=60)
    job_ids = {key.split("/")[2] for key in _keys(services, "jobs/train-")}
    assert _statuses(services, job_ids) == ["STOPPED", "SUCCEEDED"]
    assert not [key for key in _keys(services, "jobs/") if key.endswith("/running.json")]


CHECKPOINT = re.compile(r"/checkpoints/(\d+)/record\.json$")


def _statuses(services: Services, job_ids: set[str]) -> list[str]:
    """What the Jobs API says of these jobs, sorted."""
    import urllib.request

    headers = {"Authorization": f"Bearer {(services.folder / 'ray-token').read_text()}"}
    address = f"{services.stack.services['ray']['url']}/api/jobs/"
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
        return sorted(job["status"] for job in json.load(answer) if job["submission_id"] in job_ids)


def test_a_full_bucket_a_dead_network_and_a_wrong_token_are_a_sentence_each(services: Services) -> None:
    store = services.store
    tiny_bundle(f"{store}/model")
    wanted = {"request": generation(store), "backend": {"kind": "jobs", "retries": 0}}
    run_id = services.start("generate-images/generate-images", **wanted)
    before = len(_keys(services, "images/"))
    wait_for(lambda: len(_keys(services, "images/")) > before + 4, "the first images", 300)
    with services.s3.full():
        assert "cannot be used: the quota of the bucket is used up." in services.sentence(run_id)

    services.network.cut()
    run_id = services.start("generate-images/generate-images", **wanted)
    assert re.search(r"s3://\S+ cannot be (used|reached)", services.sentence(run_id))
    services.network.mend()

    token = services.folder / "ray-token"
    right = token.read_text()
    token.write_text("not-the-token")
    run_id = services.start("generate-images/generate-images", **wanted)
    assert "does not accept the token of this process: set RAY_AUTH_MODE=token" in services.sentence(run_id)
    token.write_text(right)

    run_id = services.start("generate-images/generate-images", **wanted)
    services.stack.api.wait_for(run_id, "COMPLETED", seconds=300)
    assert _leaks(services) == []


def _pictures() -> dict[str, bytes]:
    """200 PNG and JPEG files of circles and squares, three of them broken."""
    random = np.random.default_rng(0)
    files = {}
    for number in range(200):
        shape, ending = ("circle", "square")[number >= 100], ("png", "jpg")[number % 3 == 1]
        files[f"{shape}/{number:03d}.{ending}"] = _picture(shape, ending, random)
    whole = files["circle/017.png"]
    files["circle/017.png"] = whole[: len(whole) // 2]
    files["circle/055.jpg"] = b""
    files["square/101.png"] = b"This is a text."
    return files


def _picture(shape: str, ending: str, random: np.random.Generator) -> bytes:
    y, x = np.mgrid[:24, :32] - random.uniform(10, 14, (2, 1, 1))
    size = random.uniform(4, 8)
    inside = x**2 + y**2 < size**2 if shape == "circle" else (abs(x) < size) & (abs(y) < size)
    pixels = np.where(inside[..., None], random.integers(150, 256, 3), random.integers(0, 80, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"png": "PNG", "jpg": "JPEG"}[ending])
    return file.getvalue()
