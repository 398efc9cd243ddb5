"""Fixtures that every part of the suite shares, and a clean environment for all of it.

Nothing of the machine's own set-up (profiles, credentials, trackers, caches) reaches a test, and no test reaches the
network: everything listens on 127.0.0.1, on free ports, and is stopped by its own handle.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import retry, stop_after_attempt

from diffusion_core.store import Directory
from tests.swift_server import SwiftServer, swift_server

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from tests.together import Together

ROOT = Path(__file__).parent.parent

# Ray's sockets live below this folder, and a socket's path may have 107 characters: hence short and not pytest's own.
HOME = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))

SETTINGS = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PREFECT_HOME": str(HOME / "prefect"),
    "PREFECT_PROFILES_PATH": str(HOME / "prefect" / "profiles.toml"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "XDG_CACHE_HOME": str(HOME / "cache"),
    "XDG_DATA_HOME": str(HOME / "data"),
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "RAY_TMPDIR": str(HOME / "ray"),
    "RAY_USAGE_STATS_ENABLED": "0",
    # Elsewhere than on Linux this is Ray's default: no node takes the address of a network interface, only 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(HOME / "huggingface"),
    "TORCH_HOME": str(HOME / "torch"),
    "MPLCONFIGDIR": str(HOME / "matplotlib"),
    "MPLBACKEND": "agg",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
CLUSTER: pytest.StashKey[Cluster] = pytest.StashKey()
FOREIGN = ("AWS_", "PREFECT_", "MLFLOW_", "RAY_", "S3_", "DIFFUSION_")


def _clean_environment() -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            del os.environ[name]
    os.environ.update(SETTINGS)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    (HOME / "ray").mkdir()


_clean_environment()  # at import, before any library reads its settings


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)  # processes that are ending may still write there


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together | None:
    """How `-n 2 --dist loadfile` divides the suite."""
    from tests.together import Together

    return Together(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Function) -> None:
    """Before any fixture, those of a module included: only tests that ask for the shared Ray cluster find it."""
    os.environ.pop("RAY_ADDRESS", None)
    if "ray_cluster" in item.fixturenames and item.session.stash.get(CLUSTER, None):
        os.environ["RAY_ADDRESS"] = item.session.stash[CLUSTER].address


@pytest.fixture
def store(tmp_path: Path) -> str:
    """URI of a fresh store in a local folder, which does not exist yet."""
    return Directory(tmp_path / "store").uri


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    """A real S3 service. Its `environment` points clients to it; most tests want `s3_store` instead."""
    with swift_server(tmp_path_factory.mktemp("swift") / "server") as server:
        yield server


@pytest.fixture
def s3_store(s3_server: SwiftServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a fresh prefix in a fresh bucket. The environment of this process and of its children leads there."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(bucket)
    return f"s3://{bucket}/store"


@pytest.fixture(scope="session")
def ray_cluster(s3_server: SwiftServer, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A Ray cluster of one node with 2 CPUs, which jobs join because RAY_ADDRESS names it.

    Its workers can reach the S3 service: they inherit the environment that their node was started in.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        cluster = start_ray([{"num_cpus": 2}])
    request.session.stash[CLUSTER] = cluster
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        del request.session.stash[CLUSTER]
        cluster.shutdown()


@retry(stop=stop_after_attempt(3), reraise=True)  # Ray gives a node 30 s to start, which a busy machine may exceed
def start_ray(nodes: list[dict[str, object]]) -> Cluster:
    """Start a Ray cluster of some nodes on this machine, without connecting this process to it.

    Each node is given as the options of Ray's `Cluster.add_node`, as `{"num_cpus": 2}`. The caller ends it by its own
    handle, `.shutdown()`.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for node in nodes:
            options = {"node_ip_address": "127.0.0.1", "include_dashboard": False, **node}
            cluster.add_node(**options)
    except Exception:
        cluster.shutdown()
        raise
    return cluster


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server with a database of its own, which flows of this process report to."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that runs the tests, for subprocesses."""
    return sys.executable
