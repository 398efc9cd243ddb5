"""The MLflow record of a training run: made once, continued by every attempt, or made afterwards from what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_core.bundle import read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout
from diffusion_core.tracking import FlowRun, RunRecorder
from diffusion_core.training.recorder import FileRecorder, kept_figures, kept_pictures
from diffusion_core.training.run import RunDirectory, TrainSpec

_PATIENCE_S = 600.0  # for the figures of a whole run at once


class KeptRecorder(RunRecorder):
    """Tells MLflow, and with each checkpoint keeps the figures in the run's directory, for who cannot ask MLflow."""

    def __init__(self, run: RunDirectory, *args: Any) -> None:
        self._files = FileRecorder(run.directory)
        super().__init__(*args)

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        super().log(images_seen, metrics)
        self._files.note(images_seen, metrics)

    def checkpointing(self) -> None:
        self._files.write()


def recorded_mlflow_run(run: RunDirectory) -> str | None:
    """The MLflow run that records this run; None before the first attempt came that far."""
    try:
        return str(run.directory.read_json(layout.MLFLOW_RUN)["mlflow_run_id"])
    except FileNotFoundError:
        return None


def open_recorder(
    store: str, run: RunDirectory, spec: TrainSpec, experiment: str, asked_by: FlowRun | None = None
) -> RunRecorder:
    """The record of a run that is trained on, with the figures that an attempt without MLflow kept."""
    known = recorded_mlflow_run(run)
    recorder = _recorder(store, run, spec, experiment, known, asked_by)
    if known is None and not _commit(run, recorder):
        recorder = _recorder(store, run, spec, experiment, recorded_mlflow_run(run), asked_by)
    for images_seen, figures in kept_figures(run.directory):
        recorder.log(images_seen, figures)
    return recorder


def record_afterwards(store: str, run: RunDirectory, experiment: str, asked_by: FlowRun | None = None) -> str:
    """Id of the MLflow run of a run that was finished without MLflow: made now, or now told what it did not hear of.

    Raises:
        UserError: MLflow is away.
    """
    known, figures = recorded_mlflow_run(run), kept_figures(run.directory)
    marker = layout.recorded(figures[-1][0] if figures else 0)
    if known and run.directory.exists(marker):
        return known
    spec = TrainSpec.model_validate(run.directory.read_json(layout.RUN)["spec"])
    recorder = _recorder(store, run, spec, experiment, known, asked_by)
    for images_seen, values in figures:
        recorder.log(images_seen, values)
    for name, png in kept_pictures(run.directory).items():
        recorder.image(name, png)
    recorder.settle(_PATIENCE_S)
    recorder.finish()
    if left := recorder.settle(0):
        raise UserError(f"MLflow did not take {left[0]} of the run {run.run_id}: try again when it is back.")
    _commit(run, recorder)
    run.directory.create_json(marker, {"mlflow_run_id": recorded_mlflow_run(run)})
    return str(recorded_mlflow_run(run))


def mlflow_run_of(store: str, bundle_uri: str, experiment: str, asked_by: FlowRun | None = None) -> str:
    """Id of the MLflow run that trained a bundle, as the bundle says or as `record_afterwards` makes it.

    Raises:
        UserError: the bundle names no MLflow run, and its run is not in this store.
    """
    config = read_bundle_config(bundle_uri)
    if config.mlflow_run_id is not None:
        return config.mlflow_run_id
    run = RunDirectory(Directory(store) / layout.run(config.run_id))
    if not run.directory.exists(layout.RUN):
        raise UserError(
            f"The bundle {bundle_uri} names no MLflow run, and its run {config.run_id}, from which one could be made, "
            f"is not in the store {store}: give the store that it was trained in."
        )
    return record_afterwards(store, run, experiment, asked_by)


def _recorder(
    store: str,
    run: RunDirectory,
    spec: TrainSpec,
    experiment: str,
    mlflow_run_id: str | None = None,
    asked_by: FlowRun | None = None,
) -> KeptRecorder:
    description = run.directory.read_json(layout.RUN)
    dataset = description["dataset"]
    tags = {
        "run_id": run.run_id,
        "run_uri": run.directory.uri,
        "dataset": dataset["name"],
        "dataset_version": dataset["version"],
        "dataset_uri": dataset["uri"],
        "code_version": description["code_version"],
    }
    params = {**spec.model_dump(mode="json"), "dataset_version": dataset["version"]}
    name = f"{dataset['name']}-{run.run_id}"
    return KeptRecorder(run, store, experiment, name, params, tags, mlflow_run_id, asked_by)


def _commit(run: RunDirectory, recorder: RunRecorder) -> bool:
    return run.directory.create_json(layout.MLFLOW_RUN, {"mlflow_run_id": recorder.mlflow_run_id})
