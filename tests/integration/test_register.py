"""Evaluation and registration as they are run: as programs, with real Ray and MLflow, served from a clean place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_core import tracking
from diffusion_core.evaluation.config import ClassifierConfig, EvaluationConfig, GateConfig
from diffusion_core.generation import open_imageset
from diffusion_core.jobs.request import Resources
from diffusion_core.progress import parse_progress
from diffusion_core.stages.evaluate import EvaluateRequest, EvaluateResult
from diffusion_core.stages.register import RegisterRequest, RegisterResult
from diffusion_core.store import Directory
from tests.evaluated import pictures_dataset
from tests.tiny_bundle import tiny_bundle

CONFIG = EvaluationConfig(
    classifier=ClassifierConfig(width=8, features=16, images=2000, batch_size=32),
    samples=48,
    sampler={"steps": 4},
    guidance={"scale": 2.0},
    batch_size=16,
)
GATE = GateConfig(first_limit=1e6, resamples=100)


def run_job(stage: str, folder: Path, request, result_type, ok: bool = True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "diffusion_core.stages", stage, str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    if not ok:
        return done
    assert done.returncode == 0, done.stderr[-4000:]
    assert "alembic" not in done.stderr
    return result_type.model_validate_json((folder / "result.json").read_text()), done


@pytest.fixture(scope="module")
def place(ray_cluster, tmp_path_factory):
    """A store with a dataset, two untrained models and an MLflow run."""
    store = str(tmp_path_factory.mktemp("store"))
    dataset = pictures_dataset(store)
    bundles = [tiny_bundle(Path(store, str(seed)), dataset.class_names, dataset.image_shape, seed) for seed in (0, 1)]
    run_id = tracking.RunRecorder(store, "pictures", "run").mlflow_run_id
    return store, dataset, bundles, run_id


def registration(place, bundle: int, model: str, **changes) -> RegisterRequest:
    store, dataset, bundles, run_id = place
    fields = {
        "store": store,
        "model": model,
        "bundle_uri": bundles[bundle],
        "dataset_uri": dataset.uri,
        "evaluation": CONFIG,
        "gate": GATE,
        "mlflow_run_id": run_id,
        "resources": Resources(workers=2, start_timeout_s=60),
    }
    return RegisterRequest(**{**fields, **changes})


def test_evaluation_samples_measures_and_is_found_done(place, tmp_path):
    store, dataset, bundles, run_id = place
    request = EvaluateRequest(
        store=store, bundle_uri=bundles[0], dataset_uri=dataset.uri, evaluation=CONFIG, mlflow_run_id=run_id
    )
    first, done = run_job("evaluate", tmp_path / "1", request, EvaluateResult)
    assert not first.reused and first.figures["frechet_distance"] > first.floor["frechet_distance"]
    stages = {event.stage for line in done.stdout.splitlines() if (event := parse_progress(line))}
    assert {"samples to evaluate", "train the feature extractor", "features of generated images"} <= stages
    report = json.loads(Path(first.uri).read_text())
    images = open_imageset(report["image_set"])
    assert images.total_images() >= 48
    asked = images.read(0, 48)[1]
    assert asked.tolist() == dataset.read("test", limit=48).labels.tolist()
    again, _ = run_job("evaluate", tmp_path / "2", request, EvaluateResult)
    assert again.reused and again.figures == first.figures and again.seconds < first.seconds
    metrics = tracking.connection.client(store).get_run(run_id).data.metrics
    assert metrics["evaluation/precision"] == first.figures["precision"]


@pytest.mark.slow
def test_an_evaluation_that_was_killed_ends_as_if_nothing_had_happened(place, tmp_path):
    store, dataset, bundles, _ = place
    config = CONFIG.model_copy(update={"seed": 3})
    request = EvaluateRequest(store=store, bundle_uri=bundles[0], dataset_uri=dataset.uri, evaluation=config)
    whole, _ = run_job("evaluate", tmp_path / "1", request, EvaluateResult)
    folder = Directory(whole.uri.rpartition("/")[0])
    report, features = folder.read("evaluation.json"), folder.read("features.safetensors")
    for name in ("evaluation.json", "features.safetensors", "evaluation.png"):
        folder.delete(name)  # as after a kill before the report
    images = open_imageset(json.loads(report)["image_set"]).directory
    images.delete("shards/part-00000.json")
    for entry in list(images.list("manifest-")):
        images.delete(entry.key)
    run_job("evaluate", tmp_path / "2", request, EvaluateResult)
    assert folder.read("evaluation.json") == report and folder.read("features.safetensors") == features


def test_of_two_models_the_better_one_is_champion_whatever_the_order(place, tmp_path):
    results = {}
    for order in ((0, 1), (1, 0)):
        model = f"order-{order[0]}"
        for turn, bundle in enumerate(order):
            request = registration(place, bundle, model)
            results[order[0], turn], _ = run_job("register", tmp_path / f"{model}-{bundle}", request, RegisterResult)
    assert results[0, 0].promoted and results[1, 0].promoted
    second, reverse = results[0, 1], results[1, 1]
    assert second.figures["difference_low"] == pytest.approx(-reverse.figures["difference_high"])
    assert second.promoted == (second.figures["difference_high"] < 0)
    assert reverse.promoted == (reverse.figures["difference_high"] < 0)
    assert not (second.promoted and reverse.promoted)
    again, _ = run_job("register", tmp_path / "again", registration(place, 0, "order-0"), RegisterResult)
    assert again.version == 1 and again.promoted == (not second.promoted)


SERVE = """
import json, os, sys
import mlflow, numpy, pandas
assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/served@champion")
import diffusion_core
assert "/code/" in diffusion_core.__file__, diffusion_core.__file__
assert "ray" not in sys.modules and "prefect" not in sys.modules
rows = pandas.DataFrame({"label": [0, 1, 1], "image_id": [5, 6, 900]})
images = model.predict(rows, params={"steps": 3, "guidance_scale": 1.5, "seed": 7})
assert images.dtype == numpy.uint8 and images.shape == (3, 10, 10, 1), images.shape
alone = model.predict(rows.iloc[[2]].reset_index(drop=True), params={"steps": 3, "guidance_scale": 1.5, "seed": 7})
assert (alone[0] == images[2]).all(), "an image depends on the other rows"
seeds = model.predict(rows.assign(seed=[7, 7, 8]), params={"steps": 3, "guidance_scale": 1.5})
assert (seeds[:2] == images[:2]).all() and (seeds[2] != images[2]).any()
default = model.predict(pandas.DataFrame({"label": [0]}))
assert default.shape == (1, 10, 10, 1)
try:
    model.predict(pandas.DataFrame({"label": [2]}))
except ValueError as error:
    assert "accepted are 0 to 1" in str(error)
else:
    raise AssertionError("a label that does not exist was accepted")
example = model.input_example
print(json.dumps({"steps": default.tolist(), "example": model.predict(example).shape[0]}))
"""


def test_the_champion_is_served_from_a_clean_place_without_pickle(place, tmp_path):
    store = place[0]
    result, _ = run_job("register", tmp_path / "register", registration(place, 0, "served"), RegisterResult)
    assert result.promoted, result.reason
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    clean |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    away = tmp_path / "away"
    away.mkdir()
    (away / "serve.py").write_text(SERVE)
    # The packages of this environment, without this checkout.
    done = subprocess.run(
        [sys.executable, "serve.py", f"sqlite:///{store}/mlflow.db"],
        cwd=away,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["example"] == 2
    copy = tracking.resolve_model("models:/served@champion", store)
    files = [path.suffix for path in Path(store, "mlartifacts").rglob("*") if path.is_file()]
    assert ".pkl" not in files and ".pyc" not in files and copy.tags["code_version"] is not None
    requirements = next(Path(store, "mlartifacts").rglob("requirements.txt")).read_text().split()
    assert all("==" in line and "+" not in line for line in requirements)
    assert {line.partition("==")[0] for line in requirements} >= {"torch", "mlflow", "safetensors", "pydantic"}


def test_what_the_served_model_makes_is_what_generation_makes(place, tmp_path):
    import mlflow
    import numpy as np
    import pandas

    store = place[0]
    run_job("register", tmp_path / "register", registration(place, 1, "same"), RegisterResult)
    reports = [json.loads(path.read_text()) for path in Path(store, "evaluations").rglob("evaluation.json")]
    report = next(report for report in reports if report["bundle"]["uri"] == place[2][1])
    images, labels = open_imageset(report["image_set"]).read(0, 5)
    mlflow.set_tracking_uri(tracking.tracking_uri(store))
    try:
        model = mlflow.pyfunc.load_model("models:/same/1")
        served = model.predict(pandas.DataFrame({"label": labels}), params={"seed": report["configuration"]["seed"]})
    finally:
        mlflow.set_tracking_uri(None)
    assert (
        np.abs(served.astype(int) - images).max() <= 1
    )  # the neighbours in its batch differ, the label and noise do not


@pytest.mark.slow
def test_registration_in_an_s3_store(ray_cluster, s3_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/server.db")
    dataset = pictures_dataset(s3_store)
    bundle = tiny_bundle(f"{s3_store}/bundle", dataset.class_names, dataset.image_shape)
    run_id = tracking.RunRecorder(s3_store, "pictures", "run", tags={"from": "s3://a:b@c/d"}).mlflow_run_id
    place = (s3_store, dataset, [bundle], run_id)
    result, _ = run_job("register", tmp_path / "1", registration(place, 0, "remote"), RegisterResult)
    assert result.promoted and result.version == 1
    found = tracking.resolve_model("models:/remote@champion", s3_store)
    assert found.bundle_uri == bundle
    Directory(bundle).delete_tree()
    copy = tracking.resolve_model("models:/remote@champion", s3_store)
    assert copy.bundle_uri.startswith(f"{s3_store}/mlartifacts/") and copy.digest == found.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bundle_uri": "/nowhere"}, "/nowhere is not a model bundle"),
        ({"dataset_uri": "/nowhere"}, "/nowhere is not a dataset version"),
        ({"model": "a@b"}, "is not accepted as a name"),
        ({"mlflow_run_id": "unknown"}, "has no run 'unknown'"),
    ],
)
def test_bad_requests_give_one_sentence_and_exit_2(place, tmp_path, changes, said):
    done = run_job(
        "register", tmp_path, registration(place, 0, **{"model": "bad", **changes}), RegisterResult, ok=False
    )
    assert done.returncode == 2 and said in json.loads((tmp_path / "error.json").read_text())["error"]
    assert "Traceback" not in done.stderr
    assert not any(row["name"] == "bad" for row in tracking.list_models(place[0]))
