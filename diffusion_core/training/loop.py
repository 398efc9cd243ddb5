"""The training loop. Progress is counted in images, and everything that happens is a function of that count."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_core.bundle import BundleConfig, DatasetReference, save_bundle
from diffusion_core.config import UserError
from diffusion_core.data import ImageDataset, Loader, open_dataset
from diffusion_core.diffusion import training_times
from diffusion_core.networks.config import NoisyClassifierConfig
from diffusion_core.training.batches import Batches
from diffusion_core.training.checkpoint import Checkpoint, load_newest, prune_checkpoints, save_checkpoint
from diffusion_core.training.config import EmaKind
from diffusion_core.training.learner import Learner
from diffusion_core.training.posthoc import save_snapshot, snapshot_distance
from diffusion_core.training.preview import noisy_images, preview
from diffusion_core.training.recorder import FileRecorder, Recorder
from diffusion_core.training.run import IMAGES, INTERRUPTED, TIME_BUDGET, RunDirectory, TrainOutcome, TrainSpec
from diffusion_core.training.world import Decision, World
from diffusion_core.version import code_version

logger = logging.getLogger(__name__)

LOST = "lost"
_REASONS = ("", TIME_BUDGET, INTERRUPTED, LOST)  # their places are what the processes tell each other
_CHECKED_STEPS = 32  # after so many steps at most, a loss that is not finite is noticed


class DivergedError(UserError):
    """The loss is not finite any more. Raised at the same step in all processes."""


class LeaseLostError(RuntimeError):
    """Another attempt took the run over while this one looked dead: it must not write any more."""


class ProgressLike(Protocol):
    """Who is told how far the run is; `progress.Progress` is one."""

    total: float | None

    def update(self, done: float, **figures: float) -> None: ...


@dataclass
class Interval:
    """What happened since the last recording. Losses and norms stay on the device until they are looked at."""

    began: float
    images: int = 0
    waited: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    checked: int = 0


@dataclass(frozen=True)
class Position:
    """How far the run is."""

    images_seen: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    images_per_second: float = math.nan


def train(
    spec: TrainSpec,
    run: RunDirectory,
    world: World | None = None,
    recorder: Recorder | None = None,
    progress: ProgressLike | None = None,
    should_stop: Callable[[], str | None] = lambda: None,
    start: str | None = None,
) -> TrainOutcome:
    """Train until the images or the time that `spec` asks for, from wherever the run is, and export a bundle.

    Called in every process of the world with the same arguments; the leader alone writes, records and is asked to stop.

    Args:
        spec: what to train.
        run: the run's directory, from `open_run`.
        world: the processes; this one alone if None.
        recorder: where figures and pictures go; files in the run's directory if None.
        progress: told the images seen after each step.
        should_stop: asked after each step; `INTERRUPTED` saves a checkpoint and returns, `LOST` raises.
        start: URI of the bundle whose weights a new run starts from.

    Returns:
        The outcome; only the leader's names the bundle.

    Raises:
        UserError: the loss is not finite any more (`DivergedError`), the dataset is damaged, the device is too small.
        LeaseLostError: `should_stop` said so.
    """
    torch.set_num_threads(spec.training.threads)
    loop = _Loop(spec, run, world or World(), recorder, progress, should_stop, start)
    try:
        return loop.run_to_the_end()
    finally:
        loop.batches.close()


class _Loop:
    def __init__(
        self,
        spec: TrainSpec,
        run: RunDirectory,
        world: World,
        recorder: Recorder | None,
        progress: ProgressLike | None,
        should_stop: Callable[[], str | None],
        start: str | None,
    ) -> None:
        self.spec, self.config, self.run, self.world = spec, spec.training, run, world
        self.progress, self.should_stop = progress, should_stop
        self.recorder = recorder or (FileRecorder(run.directory) if world.leads else None)
        self.dataset: ImageDataset = open_dataset(spec.dataset_uri)
        self.num_classes = len(self.dataset.class_names)
        budget = self.config.memory_budget_mb << 20
        loader = Loader(self.dataset, "train", self.config.seed, memory_budget_bytes=budget)
        self.classifies = isinstance(spec.network, NoisyClassifierConfig)
        # A classifier is told every label, as it has to learn them.
        dealt = self.config.model_copy(update={"label_dropout": 0.0}) if self.classifies else self.config
        times = training_times(spec.process, self.config.objective)
        self.batches = Batches(loader, dealt, world, self.num_classes, times)
        checkpoint = load_newest(run.checkpoints) if world.leads else None
        self.position = self._agree_on_start(checkpoint)
        parts = checkpoint.parts if checkpoint else None
        shape, seen = self.dataset.image_shape, self.position.images_seen
        self.learner = Learner(spec, shape, self.num_classes, world, parts, seen, start)
        self.decision = Decision(world)

    def run_to_the_end(self) -> TrainOutcome:
        self._attempt_began = time.monotonic() - self.position.seconds
        self.interval = Interval(time.monotonic())
        if self.progress is not None and self.world.leads:
            self.progress.update(self.position.images_seen)  # what was done before says nothing of the speed
        reason = TIME_BUDGET if self._budget_is_spent() else ""
        while not reason and self.position.images_seen < self.config.target_images:
            reason = self._step()
        self.decision.settle()
        if reason == LOST:
            raise self._lost()
        self._record()
        self._save()
        return self._finish(reason or IMAGES)

    def _step(self) -> str:
        """One optimizer step and what is due after it; returns why to stop, or nothing."""
        before = self.position.images_seen
        asked = time.monotonic()
        batch = self.batches.fetch(before)
        self.interval.waited += time.monotonic() - asked
        after = before + self.config.batch_size
        loss, norm = self.learner.step(after, self.batches.microbatches(before, batch), self.batches.count)
        self.interval.losses.append(loss)
        self.interval.norms.append(norm)
        self.interval.images += self.config.batch_size
        self.position = replace(self.position, images_seen=after, seconds=time.monotonic() - self._attempt_began)
        if len(self.interval.norms) - self.interval.checked >= _CHECKED_STEPS:
            self._check_finite()
        self._do_what_is_due(before, after)
        if self.progress is not None and self.world.leads:
            self.progress.update(after)
        return _REASONS[self.decision.exchange(_REASONS.index(self._why_stop()))]

    def _do_what_is_due(self, before: int, after: int) -> None:
        """Snapshot, recording, checkpoint and preview, each when the count passes a multiple of its distance."""

        def due(distance: int) -> bool:
            return distance > 0 and before // distance < after // distance

        # Before the checkpoint: a run that goes on from there does not come past this count again.
        if due(snapshot_distance(self.config, after)):
            self._check_finite()
            if self.world.leads:
                self._snapshot()
        saves = due(self.config.checkpoint_every_images) and after < self.config.target_images
        if saves or due(self.config.log_every_images):  # a checkpoint never cuts an interval in two
            self._record()
        if saves:
            self._save()
        if due(self.config.preview_every_images) and after < self.config.target_images and self.world.leads:
            began = time.monotonic()
            self._recorder.image(f"preview-{after:09d}", self._preview())
            self.interval.began += time.monotonic() - began  # the speed is that of training

    def _why_stop(self) -> str:
        if not self.world.leads:
            return ""
        return self.should_stop() or (TIME_BUDGET if self._budget_is_spent() else "")

    def _budget_is_spent(self) -> bool:
        return self.config.time_budget_s is not None and self.position.seconds >= self.config.time_budget_s

    def _record(self) -> None:
        """Close the interval: check it, and record its means over steps and processes."""
        interval = self.interval
        if not interval.images:
            return
        self._check_finite()
        losses = self.world.sum(torch.stack(interval.losses).double().cpu())
        seconds = time.monotonic() - interval.began
        speed = interval.images / seconds
        self.position = replace(self.position, loss=float(losses.mean()), images_per_second=speed)
        figures = {
            "loss": self.position.loss,
            "grad_norm": float(torch.stack(interval.norms).double().mean()),
            "learning_rate": self.learner.learning_rate(self.position.images_seen),
            "images_per_second": speed,
            "data_wait_share": interval.waited / seconds,
            "epoch": self.position.images_seen / self.dataset.num_rows("train"),
        }
        if self.world.leads:
            self._recorder.log(self.position.images_seen, figures)
            if self.progress is not None:
                self._tell(figures)
        self.interval = Interval(time.monotonic())

    def _tell(self, figures: dict[str, float]) -> None:
        assert self.progress is not None
        if self.config.time_budget_s is not None:
            left = max(0.0, self.config.time_budget_s - self.position.seconds) * figures["images_per_second"]
            self.progress.total = min(self.config.target_images, round(self.position.images_seen + left))
        self.progress.update(self.position.images_seen, loss=figures["loss"])

    def _check_finite(self) -> None:
        """Stop before weights that are not numbers can be stored. The norm is the same in all processes."""
        norms = torch.stack(self.interval.norms).cpu()
        bad = torch.nonzero(~torch.isfinite(norms)).flatten().tolist()
        self.interval.checked = len(norms)
        if not bad:
            return
        steps_ago = len(norms) - 1 - bad[0]
        seen = self.position.images_seen - steps_ago * self.config.batch_size
        rate = self.learner.learning_rate(seen)
        raise DivergedError(
            f"training.learning_rate: the loss was no longer finite after {seen:,} images, at a learning rate of "
            f"{rate:.3g}; use a lower rate, a longer training.warmup_images, a smaller training.grad_clip, or "
            "training.precision float32."
        )

    def _save(self) -> None:
        """Commit a checkpoint; the leader's work."""
        position = self.position
        if self.world.leads and position.images_seen:
            self._check_lease()
            self._recorder.checkpointing()
            meta = {
                "seconds": position.seconds,
                "loss": position.loss,
                "images_per_second": position.images_per_second,
                "world_size": self.world.size,
                "code_version": code_version(),
                "unrecorded": self._recorder.unrecorded(),
            }
            save_checkpoint(self.run.checkpoints, Checkpoint(position.images_seen, self.learner.state(), meta))
            prune_checkpoints(self.run.checkpoints, self.config.keep_checkpoints, position.images_seen)
        self.interval = Interval(time.monotonic())

    def _snapshot(self) -> None:
        """Keep what another average can be made of after training."""
        began = time.monotonic()
        self._check_lease()
        save_snapshot(self.run, self.config, self.position.images_seen, self.learner.averaged())
        self.interval.began += time.monotonic() - began

    def _check_lease(self) -> None:
        """Before the leader writes what others will read."""
        if self.should_stop() == LOST:
            raise self._lost()

    def _lost(self) -> LeaseLostError:
        return LeaseLostError(f"Another attempt took over the run {self.run.directory.uri}.")

    def _agree_on_start(self, checkpoint: Checkpoint | None) -> Position:
        if checkpoint is None:
            mine = Position()
        else:
            meta: dict[str, Any] = checkpoint.meta
            mine = Position(checkpoint.images_seen, meta["seconds"], meta["loss"], meta["images_per_second"])
            logger.info("Continuing at %s images.", f"{checkpoint.images_seen:,}")
            for images_seen, figures in meta.get("unrecorded", []):
                self._recorder.log(images_seen, figures)
        seen, seconds, loss, speed = self.world.from_leader(
            [mine.images_seen, mine.seconds, mine.loss, mine.images_per_second]
        )
        return Position(int(seen), seconds, loss, speed)

    def _finish(self, reason: str) -> TrainOutcome:
        position = self.position
        outcome = TrainOutcome(
            images_seen=position.images_seen,
            loss=position.loss,
            images_per_second=position.images_per_second,
            seconds=position.seconds,
            stopped=reason,
        )
        if not self.world.leads:
            return outcome
        outcome = outcome.model_copy(update={"mlflow_run_id": self._recorder.mlflow_run_id})
        if reason == INTERRUPTED:
            self._recorder.finish("KILLED")
            return outcome
        if self.config.ema is EmaKind.POWER and position.images_seen:
            self._snapshot()
        samples = self._preview()
        self._check_lease()
        bundle_digest = self._export(samples)
        self._recorder.image("samples", samples)
        self._recorder.finish("FINISHED")
        return self.run.record_finished(outcome.model_copy(update={"bundle_digest": bundle_digest}))

    def _export(self, samples: bytes) -> str:
        assert self.learner.ema is not None
        dataset = DatasetReference(name=self.dataset.name, version=self.dataset.version, uri=self.dataset.uri)
        config = BundleConfig(
            process=self.spec.process,
            network=self.spec.network,
            image_shape=self.dataset.image_shape,
            class_names=tuple(self.dataset.class_names),
            dataset=dataset,
            run_id=self.run.run_id,
            images_seen=self.position.images_seen,
            ema_sigma_rel=self.config.ema_sigma_rels[0] if self.config.ema is EmaKind.POWER else None,
            code_version=code_version(),
            mlflow_run_id=self._recorder.mlflow_run_id or None,
        )
        weights = self.learner.ema.network.state_dict()
        return save_bundle(self.run.bundle(self.position.images_seen), config, weights, samples)

    def _preview(self) -> bytes:
        assert self.learner.ema is not None
        if self.classifies:
            images = self.dataset.read("train", limit=self.config.preview_images).images
            return noisy_images(self.learner.process, images, self.config.seed)
        try:
            return preview(
                self.learner.ema.network,
                self.learner.process,
                self.dataset.image_shape,
                self.num_classes,
                count=self.config.preview_images,
                steps=min(self.config.preview_steps, self.spec.process.timesteps),
                seed=self.config.seed,
                device=self.world.device,
            )
        except ValueError as error:
            raise UserError(
                f"training.learning_rate: the network has diverged after {self.position.images_seen:,} images"
                f" ({error}); use a lower rate or a longer training.warmup_images."
            ) from error

    @property
    def _recorder(self) -> Recorder:
        assert self.recorder is not None
        return self.recorder
