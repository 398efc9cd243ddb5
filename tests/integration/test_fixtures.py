"""The services that the suite starts do what their users rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from diffusion_core.store import Directory

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

WORK = """
import json, os, sys
import ray
from diffusion_core.store import Directory

ray.init(log_to_driver=False)  # joins RAY_ADDRESS

@ray.remote
def write(uri, n):
    return Directory(uri).create(f"part-{n}", b"from a worker")

won = ray.get([write.remote(sys.argv[1], n % 2) for n in range(4)])
cpus, node = ray.cluster_resources()["CPU"], ray.nodes()[0]["NodeManagerAddress"]
print(json.dumps({"cpus": cpus, "won": sum(won), "node": node}))
"""


def test_a_subprocess_joins_the_cluster_and_its_workers_reach_the_store(ray_cluster: Cluster, s3_store: str) -> None:
    done = subprocess.run([sys.executable, "-c", WORK, s3_store], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"cpus": 2.0, "won": 2, "node": "127.0.0.1"}
    assert len(list(Directory(s3_store).list())) == 2


def test_a_test_that_asks_for_nothing_finds_no_service() -> None:
    assert not {"RAY_ADDRESS", "AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"} & set(os.environ)
