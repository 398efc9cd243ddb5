"""The record and the registry on a real MLflow server, whose artifacts are reached through it alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_core import tracking
from diffusion_core.config import UserError
from diffusion_core.tracking.registry import ServingDefaults
from tests.tiny_bundle import tiny_bundle

DEFAULTS = ServingDefaults(sampler={"kind": "ddim", "steps": 2}, guidance_scale=1.0, batch_size=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "artifacts")]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
        log.close()


def test_runs_and_models_live_on_a_server(server, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    with pytest.raises(UserError, match="registered are: none"):
        tracking.check_alias("models:/toys@champion", store)
    first = tracking.RunRecorder(store, "toys", "run", {"network": {"width": 8}})
    first.log(10, {"loss": 1.0})
    first.image("preview", b"png")
    assert first.settle(60) == []
    again = tracking.RunRecorder(store, "toys", "run", {}, {}, first.mlflow_run_id)
    assert again.last_step == 10
    again.finish()
    bundle = tiny_bundle(tmp_path / "bundle")
    assert tracking.register_version(store, "toys", bundle, first.mlflow_run_id, DEFAULTS) == (1, True)
    assert tracking.register_version(store, "toys", bundle, first.mlflow_run_id, DEFAULTS) == (1, False)
    tracking.promote("toys", 1, store)
    found = tracking.resolve_model("models:/toys@champion", store)
    assert found.bundle_uri == bundle
    os.rename(bundle, tmp_path / "gone")
    run = urllib.request.urlopen(f"{server}/api/2.0/mlflow/experiments/get-by-name?experiment_name=toys").read()
    experiment = json.loads(run)["experiment"]["experiment_id"]
    page = f"{server}/#/experiments/{experiment}/runs/{first.mlflow_run_id}"
    assert tracking.page(f"runs:/{first.mlflow_run_id}", store) == page
    assert tracking.page("runs:/gone", store) is None
    copy = tracking.resolve_model("models:/toys@champion", store)
    assert copy.bundle_uri == f"{store}/bundles/{found.digest}" and copy.digest == found.digest
    assert not Path(store, "mlflow.db").exists()
