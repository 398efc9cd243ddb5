"""What a report says beyond the figures: what changed since the last run, and where to look further."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffusion_core.data.shards import Batch, write_dataset
from diffusion_core.jobs.backend import BackendConfig
from diffusion_core.stages.registry import STAGES
from diffusion_core.stages.settings import load_config
from diffusion_core.store import Directory
from diffusion_core.tracking import RunRecorder
from flows import artifacts, last_run, trail
from tests.unit.test_results import RESULT

FIGURES = ({"kid": 0.0123, "kid_error": 0.0006, "recall": 0.5}, {"kid": 0.0101, "kid_error": 0.0005, "recall": 0.5})


@pytest.fixture
def two_runs(tmp_path):
    """A store with results of two runs: of an image more and one less, trained longer, measured anew."""
    store, runs = str(tmp_path), []
    pixels = np.arange(8 * 16).reshape(8, 4, 4, 1).astype(np.uint8)
    for number, (kept, images) in enumerate(((slice(0, 6), 64_000), (slice(1, 8), 128_000))):
        keys = [f"{row}.png" for row in range(8)][kept]
        dataset = write_dataset(store, "digits", {"train": Batch(pixels[kept] + (keys[0] == "1.png"), keys=keys)}, [])
        evaluation = f"{store}/evaluations/e{number}/evaluation.json"
        Directory(store).write_json(f"evaluations/e{number}/evaluation.json", {"figures": FIGURES[number]})
        runs.append(
            RESULT.model_copy(
                update={
                    "store": store,
                    "dataset": RESULT.dataset.model_copy(update={"uri": dataset.uri, "version": dataset.version}),
                    "run": RESULT.run.model_copy(update={"images_seen": images, "loss": 0.08 / (1 + number)}),
                    "evaluation": RESULT.evaluation.model_copy(update={"uri": evaluation, "figures": FIGURES[number]}),
                    "version": RESULT.version.model_copy(update={"version": 3 + number}),
                }
            )
        )
    return runs


def config(store, *settings):
    return load_config("digits", settings=list(settings), shortcuts={"store": store})


def test_a_report_says_what_changed_since_the_last_run(two_runs):
    first, second = two_runs
    assert last_run.changes(first, config(first.store, "source.uri=s3://key:secret@pets")) == {}
    assert last_run.changes(first, config(first.store, "source.uri=s3://key:secret@pets")) == {}
    changed = config(
        first.store, "training.images=128000", "training.init_from=models:/digits/3", "source.uri=s3://pets"
    )
    found = last_run.changes(second, changed)
    since = found.pop("last run")
    assert since.endswith("UTC")
    assert found == {
        "dataset": f"digits/{first.dataset.version} → digits/{second.dataset.version}; train 6 → 7; "
        "2 images added, 1 removed, 5 changed",
        "training.images": "96000 → 128000",
        "training.init_from": "none → models:/digits/3",
        "loss": "0.08000 → 0.04000",
        "kid": "0.01230 ± 0.00060 → 0.01010 ± 0.00050",
        "model version": "models:/digits/3 → models:/digits/4",
    }
    assert "secret" not in Path(first.store, "outcomes/digits/last.json").read_text()


def test_a_store_of_before_is_compared_by_what_it_noted(two_runs):
    first, second = two_runs
    last_run.news(first)  # what earlier versions wrote, and all of it
    found = last_run.changes(second, config(first.store))
    assert set(found) == {"last run", "dataset", "kid", "model version"}


def test_what_is_not_known_any_more_is_left_out(two_runs):
    first, second = two_runs
    last_run.changes(first, config(first.store))
    for gone in (f"{first.dataset.uri.removeprefix(first.store)}/manifest.json", "/evaluations/e0/evaluation.json"):
        Path(first.store + gone).unlink()
    note = Path(first.store, "outcomes/digits/last.json")
    noted = json.loads(note.read_text())
    note.write_text(json.dumps({**noted, "config": {**noted["config"], "of_another_time": 1}}))
    found = last_run.changes(second, config(first.store))
    assert found["dataset"].endswith("; the old one is gone") and "kid" not in found
    assert found["configuration"].startswith("that of the last run is not accepted any more")


@pytest.mark.parametrize(
    "figures, promoted, previous, other",
    [
        ({}, True, None, None),
        ({"champion_version": 2}, False, None, "version 2, champion"),
        ({}, True, 2, "version 2, champion before"),
    ],
)
def test_the_samples_stand_beside_those_of_the_version_it_is_measured_by(tmp_path, figures, promoted, previous, other):
    bundle = Directory(tmp_path / "bundle")
    bundle.write("samples.png", b"new")
    changes = {"figures": figures, "promoted": promoted, "previous": previous}
    result = RESULT.model_copy(
        update={
            "store": str(tmp_path),
            "run": RESULT.run.model_copy(update={"bundle_uri": bundle.uri}),
            "version": RESULT.version.model_copy(update=changes),
        }
    )
    titles, _, cells = artifacts.beside_the_champion(result).splitlines()
    assert titles == f"| version 3, {result.version.alias} |" + (f" {other} |" if other else "")
    assert cells.startswith("| ![samples.png](data:image/png;base64,bmV3) |")
    assert ("There is no sample sheet: There is no registered model" in cells) == bool(other)


def test_links_lead_to_mlflow_and_the_ray_job_without_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example/base/")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://me:secret@head:8265/")
    stage, jobs = STAGES["register"].load(), BackendConfig(kind="jobs")
    result = RESULT.version.model_copy(update={"job": "s3://key:secret@bucket/store/jobs/register-1"})
    rows = trail.of_stage(stage, result, str(tmp_path), jobs)
    assert rows == [
        ("MLflow", "[models:/digits/3](https://mlflow.example/base/#/models/digits/versions/3)"),
        ("job", "[register-1](http://head:8265/#/jobs/register-1)"),
        ("log", "s3://bucket/store/jobs/register-1/log.txt"),
        ("result", "s3://bucket/store/jobs/register-1/result.json"),
    ]
    monkeypatch.setenv("DIFFUSION_RAY_UI", "https://ray.example/")
    assert dict(trail.of_stage(stage, result, str(tmp_path), jobs))["job"] == (
        "[register-1](https://ray.example/#/jobs/register-1)"
    )


def test_a_record_that_is_a_file_may_be_shown_by_a_server(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_MLFLOW_UI", "http://127.0.0.1:5000")
    run = RunRecorder(str(tmp_path), "digits", "run").mlflow_run_id
    result = RESULT.run.model_copy(update={"mlflow_run_id": run})
    shown = dict(trail.of_stage(STAGES["train"].load(), result, str(tmp_path), BackendConfig()))
    assert shown == {"MLflow": f"[runs:/{run}](http://127.0.0.1:5000/#/experiments/1/runs/{run})"}
    gone = dict(trail.of_stage(STAGES["train"].load(), RESULT.run, str(tmp_path), BackendConfig()))
    assert gone["MLflow"].startswith("runs:/m1 (")


def test_a_record_without_a_server_says_how_it_is_shown(tmp_path):
    train, shard = trail.of_pipeline(
        {"train": RESULT.run.model_copy(update={"job": "/s/jobs/train-1"}), "shard": RESULT.dataset},
        str(tmp_path), BackendConfig(),
    )  # fmt: skip
    assert train["MLflow"] == f"runs:/m1 (`mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db`)"
    assert train["job"] == "train-1" and shard == {"stage": "shard"}
