"""A training run as a directory of the store: what it is, how far it is, and what came out of it.

`<store>/runs/<run_id>/` holds `run.json` (what is trained on what), `attempts/` (who works on it, see `lease`),
`checkpoints/`, `snapshots/` (of power-function averages, see `posthoc`), `bundles/<images_seen>/`,
`finished/<images_seen>.json` (one for each length that it was trained to), `previews/` and `progress.json`. The id is a
digest of everything that changes numbers, so that starting the same training again continues it. Light: nothing here
imports torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from diffusion_core.config import Config, UserError, digest, execution, identity
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.diffusion.objective_config import ObjectiveConfig, check_objective
from diffusion_core.networks.config import NetworkConfig, UNetConfig, check_image_size
from diffusion_core.store import Directory, layout
from diffusion_core.training.config import TrainingConfig
from diffusion_core.version import code_version

if TYPE_CHECKING:
    from diffusion_core.bundle import BundleConfig
    from diffusion_core.data import ImageDataset

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
IMAGES, TIME_BUDGET, INTERRUPTED = "images", "time budget", "interrupted"


class TrainSpec(Config):
    """What is trained on what. Everything that a process of the run needs to know besides the store."""

    dataset_uri: str = execution(description="URI of the dataset version; its version, not its place, enters the id.")
    process: ProcessConfig = ProcessConfig()
    network: NetworkConfig = UNetConfig()
    training: TrainingConfig = TrainingConfig()


class TrainOutcome(Config):
    """How a run ended."""

    images_seen: int
    loss: float = Field(description="Mean loss over the last logging interval.")
    images_per_second: float = Field(description="Speed over the last logging interval.")
    seconds: float = Field(description="Seconds of training, over all attempts.")
    stopped: str = Field(description="What ended it: images, time budget, or interrupted.")
    bundle_digest: str | None = Field(None, description="Digest of the exported bundle; none if interrupted.")
    mlflow_run_id: str = Field("", description="MLflow run that recorded it; empty without MLflow.")


@dataclass(frozen=True)
class RunDirectory:
    """The places of one run. Holds URIs only, so that it can be sent to any process."""

    directory: Directory

    @property
    def run_id(self) -> str:
        return self.directory.name

    @property
    def attempts(self) -> Directory:
        return self.directory / layout.ATTEMPTS

    @property
    def checkpoints(self) -> Directory:
        return self.directory / layout.CHECKPOINTS

    @property
    def snapshots(self) -> Directory:
        return self.directory / layout.SNAPSHOTS

    def bundle(self, images_seen: int) -> Directory:
        return self.directory / layout.bundle(images_seen)

    def finished(self, training: TrainingConfig) -> TrainOutcome | None:
        """The outcome, if this run was already trained as long as `training` asks, and its bundle is there.

        Long enough is: to the number of images (the least finished number that is not below it), or for the time
        budget.
        """
        outcomes = [outcome for outcome in self._outcomes() if self.bundle(outcome.images_seen).exists(layout.BUNDLE)]
        for outcome in outcomes:
            if outcome.images_seen >= training.target_images:
                return outcome
        last = outcomes[-1] if outcomes else None
        spent = last is not None and training.time_budget_s is not None and last.seconds >= training.time_budget_s
        return last if spent else None

    def record_finished(self, outcome: TrainOutcome) -> TrainOutcome:
        """Commit an outcome; returns the one that is stored, which is an earlier one if there was one."""
        key = layout.finished(outcome.images_seen)
        if self.directory.create(key, outcome.model_dump_json(indent=2).encode()):
            return outcome
        return TrainOutcome.model_validate_json(self.directory.read(key))

    def _outcomes(self) -> list[TrainOutcome]:
        keys = [entry.key for entry in self.directory.list(layout.FINISHED)]
        outcomes = [TrainOutcome.model_validate_json(self.directory.read(key)) for key in keys]
        return sorted(outcomes, key=lambda outcome: outcome.images_seen)


def open_run(store: Directory | str, spec: TrainSpec, init_uri: str | None = None) -> RunDirectory:
    """The directory of the run that `spec` describes, made if it is new. Arguments and errors are `find_run`'s."""
    run, description = _described(store, spec, init_uri)
    run.directory.create_json(layout.RUN, description)
    return run


def find_run(store: Directory | str, spec: TrainSpec, init_uri: str | None = None) -> RunDirectory:
    """The directory of the run that `spec` describes, whether it is there or not; nothing is written.

    Args:
        store: root of the store.
        spec: what to train.
        init_uri: the bundle that `training.init_from` was resolved to, if it is not a bundle URI itself.

    Raises:
        UserError: no dataset version, no training images, images that the network cannot halve, an objective that
            does not suit the process, or a bundle to start from that does not fit.
    """
    return _described(store, spec, init_uri)[0]


def _described(store: Directory | str, spec: TrainSpec, init_uri: str | None) -> tuple[RunDirectory, dict[str, Any]]:
    from diffusion_core.data import open_dataset

    dataset = open_dataset(spec.dataset_uri)
    if not dataset.num_rows("train"):
        raise UserError(f"The dataset {dataset.uri} has no images in its split train.")
    height, width, _ = dataset.image_shape
    check_image_size(spec.network, height, width)
    check_task(spec.network, spec.training.objective, spec.process, len(dataset.class_names))
    source = init_uri or spec.training.init_from
    start = _starting_point(source, spec, dataset) if source else None
    parts = {"dataset": dataset.version, "start": start, "spec": identity(spec)}
    run_id = digest("run", SCHEMA_VERSION, parts)
    root = store if isinstance(store, Directory) else Directory(store)
    return RunDirectory(root / layout.run(run_id)), _description(run_id, spec, dataset, start, source)


def check_task(network: NetworkConfig, objective: ObjectiveConfig, process: ProcessConfig, num_classes: int) -> None:
    """The objective suits the process; a classifier has its own, the cross-entropy of the labels.

    Raises:
        UserError: naming what does not go together, or if there is nothing for a classifier to tell apart.
    """
    if network.kind != "classifier":
        return check_objective("training.objective", objective, process)
    if num_classes < 2:
        raise UserError(
            f"network.kind: classifier needs a dataset with two classes at least, and this has {num_classes}."
        )
    if objective != ObjectiveConfig():
        raise UserError(
            "training.objective is not for the network.kind classifier, which learns the labels by cross-entropy: "
            "leave it out."
        )


def check_start(theirs: BundleConfig, network: NetworkConfig, process: ProcessConfig, channels: int) -> None:
    """Refuse to start training from the weights of a bundle that do not fit; dropout has no weights and may differ.

    Args:
        theirs: configuration of the bundle.
        network, process: what is to be trained.
        channels: of the images to train on.

    Raises:
        UserError: naming the field, and both values.
    """
    if theirs.network.kind != network.kind:
        raise UserError(
            f"training.init_from: that model has network.kind = {theirs.network.kind}, and this run has {network.kind}."
        )
    for name in type(network).model_fields:
        other, ours = getattr(theirs.network, name), getattr(network, name)
        if other != ours and name != "dropout":
            raise UserError(f"training.init_from: that model has network.{name} = {other}, and this run has {ours}.")
    if theirs.process.prediction != process.prediction:
        raise UserError(
            f"training.init_from: that model predicts {theirs.process.prediction}, and this run would train it to "
            f"predict {process.prediction} (process.prediction)."
        )
    if theirs.process.output_channels(channels) != process.output_channels(channels):
        raise UserError(
            f"training.init_from: that model has the variance {theirs.process.variance}, and this run has "
            f"{process.variance} (process.variance): both must be learned_range, or neither."
        )
    if theirs.image_shape[2] != channels:
        raise UserError(
            f"training.init_from: that model makes images with {theirs.image_shape[2]} channels, and the dataset has "
            f"{channels}."
        )


def _starting_point(uri: str, spec: TrainSpec, dataset: ImageDataset) -> str:
    """The digest of the bundle to start from, after a look at whether its weights fit."""
    from diffusion_core.bundle import bundle_digest, read_bundle_config

    if uri.startswith("models:/"):
        raise UserError(
            f"training.init_from: {uri} must be resolved by the train job; without it, give the URI of a bundle."
        )
    check_start(read_bundle_config(uri), spec.network, spec.process, dataset.image_shape[2])
    return bundle_digest(uri)


def _description(
    run_id: str, spec: TrainSpec, dataset: ImageDataset, start: str | None, source: str | None
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "dataset": {"name": dataset.name, "version": dataset.version, "uri": dataset.uri},
        "init_from": None if start is None else {"digest": start, "uri": source},
        "spec": spec.model_dump(mode="json"),
        "code_version": code_version(),
    }
