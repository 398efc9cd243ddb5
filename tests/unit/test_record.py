"""The MLflow record of runs that were trained without MLflow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_core.config import UserError
from diffusion_core.jobs.record import mlflow_run_of, open_recorder, record_afterwards, recorded_mlflow_run
from diffusion_core.tracking import FlowRun, connection, runs
from diffusion_core.training import open_run, train
from diffusion_core.training.curve import loss_curve
from tests.tiny_bundle import tiny_bundle
from tests.toy_training import losses, toy_dataset, toy_spec


@pytest.fixture
def trained(store):
    """A run that the program without Ray has finished."""
    spec = toy_spec(toy_dataset(store), preview_every_images=100)
    run = open_run(store, spec)
    outcome = train(spec, run)
    assert outcome.mlflow_run_id == ""
    return store, spec, run, run.bundle(200).uri


def test_a_run_without_mlflow_is_recorded_from_what_it_kept(trained):
    store, _, run, bundle_uri = trained
    mlflow_run_id = mlflow_run_of(store, bundle_uri, "toys")
    mlflow = connection.client(store)
    recorded = mlflow.get_run(mlflow_run_id)
    assert recorded.info.status == "FINISHED" and recorded.data.tags["run_id"] == run.run_id
    assert recorded.data.params["training.images"] == "200"
    history = mlflow.get_metric_history(mlflow_run_id, "loss")
    assert {metric.step: metric.value for metric in history} == losses(run)
    pictures = [file.path for file in mlflow.list_artifacts(mlflow_run_id, "images")]
    assert pictures == ["images/preview-000000100.png", "images/samples.png"]
    assert mlflow_run_of(store, bundle_uri, "toys") == mlflow_run_id == record_afterwards(store, run, "toys")


def test_an_attempt_with_mlflow_records_the_figures_of_those_before_it(trained):
    store, spec, run, _ = trained
    recorder = open_recorder(store, run, spec, "toys")
    assert recorder.settle(30) == [] and recorder.last_step == 200
    history = connection.client(store).get_metric_history(recorder.mlflow_run_id, "loss")
    assert {metric.step: metric.value for metric in history} == losses(run)
    assert recorded_mlflow_run(run) == recorder.mlflow_run_id


def test_what_mlflow_is_told_is_kept_with_the_run_too_and_names_who_asked(store):
    spec = toy_spec(toy_dataset(store), images=200, checkpoint_every_images=100)
    run = open_run(store, spec)
    asked_by = [FlowRun(id="1", name="red-ant", deployment="train-model/train-model"), FlowRun(id="2")]
    for flow_run, images in zip(asked_by, (200, 300), strict=True):
        longer = toy_spec(toy_dataset(store), images=images, checkpoint_every_images=100)
        train(longer, run, recorder=open_recorder(store, run, longer, "toys", flow_run))
    recorded = connection.client(store).get_run(recorded_mlflow_run(run))
    history = connection.client(store).get_metric_history(recorded.info.run_id, "loss")
    assert {metric.step: metric.value for metric in history} == losses(run) and max(losses(run)) == 300
    told = {key: value for key, value in recorded.data.tags.items() if key.startswith("prefect.")}
    assert told == {
        "prefect.flow_run_id": "2",
        "prefect.flow_run_ids": "1 2",
        "prefect.flow_run_name": "",
        "prefect.deployment": "",
    }
    png = Image.open(io.BytesIO(loss_curve(run.directory)))
    assert png.size == (720, 300) and np.asarray(png.convert("L")).min() < 100


def test_what_was_trained_without_mlflow_after_a_record_was_made_is_added_to_it(trained):
    store, _, run, _ = trained
    first = record_afterwards(store, run, "toys")
    longer = toy_spec(toy_dataset(store), preview_every_images=100, images=300)
    train(longer, open_run(store, longer))
    mlflow_run_id = mlflow_run_of(store, run.bundle(300).uri, "toys")
    assert mlflow_run_id == first
    history = connection.client(store).get_metric_history(first, "loss")
    assert {metric.step: metric.value for metric in history} == losses(run) and history[-1].step == 300


def test_a_record_that_mlflow_did_not_take_whole_is_made_again(trained, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    store, _, run, _ = trained

    def away(*_, **__):
        raise MlflowException("away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", away)
        patch.setitem(runs._PATIENCE_S, "FINISHED", 0.1)
        with pytest.raises(UserError, match=f"did not take that it is FINISHED of the run {run.run_id}: try again"):
            record_afterwards(store, run, "toys")
    assert recorded_mlflow_run(run) is None
    assert record_afterwards(store, run, "toys") == recorded_mlflow_run(run)


def test_a_bundle_of_another_store_says_what_to_do(store, tmp_path):
    bundle_uri = tiny_bundle(tmp_path / "bundle")
    with pytest.raises(UserError, match=r"names no MLflow run, and its run 0123456789abcdef.* give the store"):
        mlflow_run_of(store, bundle_uri, "toys")
