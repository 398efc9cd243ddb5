"""What follows from what is left to do and from the trial: seconds, bytes and memory of each stage. No measuring."""

from __future__ import annotations

import math
import os

from pydantic import Field

from diffusion_core.config import Config
from diffusion_core.evaluation.config import Extractor, LikelihoodMethod
from diffusion_core.jobs.backend import BackendKind
from diffusion_core.planning.crew import PartResult, Trial
from diffusion_core.planning.outlook import Outlook, State
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.pipeline import STEPS

FOUND_S = 3.0  # of a job that finds its work done, as measured once: little beside any stage that runs
RAY_STARTS = 4.0  # Ray's import, start and end, in imports of Ray, as measured once: on two busy cores 4.1
EXACT_STEP = 12  # network evaluations of a step of the exact likelihood: four, each with a gradient
RAY_BYTES = 900 << 20  # of Ray's own processes on a machine and of the job's program


class StagePlan(Config):
    """What a stage would do and take."""

    stage: str
    state: State
    images: int = Field(0, description="Images that it would work on.")
    steps: int = Field(0, description="Optimizer steps, or evaluations of the network for a batch of images.")
    bytes: int = Field(0, description="Bytes that it would add to the store.")
    seconds: float = Field(description="Wall-clock seconds of its job.")
    gpu_hours: float = 0.0
    memory_bytes: int = Field(0, description="Main memory that its workers and Ray hold at once.")
    gpu_memory_bytes: int = Field(0, description="Memory of a GPU that one of its workers holds.")


def estimate(config: PipelineConfig, outlook: Outlook, trial: Trial) -> list[StagePlan]:
    """The plan of each stage, in order."""
    return [_Estimate(config, outlook, trial).of(step.stage) for step in STEPS]


class _Estimate:
    def __init__(self, config: PipelineConfig, outlook: Outlook, trial: Trial) -> None:
        self.config, self.outlook, self.trial = config, outlook, trial
        self.raw = math.prod(outlook.image_shape)
        joins = config.backend.kind is BackendKind.jobs or os.environ.get("RAY_ADDRESS")
        import_s = trial["ray"].figures["import_s"] if "ray" in trial else 0.0
        self.ray_s = import_s if joins else RAY_STARTS * import_s  # a cluster that is joined runs already

    def of(self, stage: str) -> StagePlan:
        work = self.outlook.work[stage]
        if work.state is State.done:
            looked = self.outlook.hash_s if stage == "shard" else 0.0
            return StagePlan(stage=stage, state=work.state, seconds=FOUND_S + looked)
        plan: StagePlan = getattr(self, f"_{stage}")()
        resources = getattr(self.config.resources, stage, self.config.resources.evaluate)
        gpus = 0.0 if stage in ("shard", "register") else resources.workers * resources.gpus_per_worker
        return plan.model_copy(update={"gpu_hours": plan.seconds * gpus / 3600})

    def _shard(self) -> StagePlan:
        part, work = self.trial["shard"], self.outlook.work["shard"]
        workers = self.config.resources.shard.workers
        seconds = (
            part.ready_s
            + self.outlook.hash_s
            + self.ray_s
            + part.figures["opened_s"]
            + work.images / _rate(part, "images_per_second", workers)
        )
        return StagePlan(
            stage="shard",
            state=work.state,
            images=work.images,
            bytes=round(work.images * part.figures["bytes_per_image"]),
            seconds=seconds,
            memory_bytes=RAY_BYTES + workers * part.peak_bytes,
        )

    def _train(self) -> StagePlan:
        part, work, training = self.trial["train"], self.outlook.work["train"], self.config.training
        saves = work.images // training.checkpoint_every_images
        previews = work.images // training.preview_every_images if training.preview_every_images else 0
        figures = part.figures
        aside = saves * figures["save_s"] + previews * max(0.0, figures["finish_s"] - figures["save_s"])
        needed = work.images / figures["images_per_second"] + aside
        budget = math.inf if training.time_budget_s is None else max(0.0, training.time_budget_s - work.seconds)
        looping = min(needed, budget)
        images = round(work.images * looping / needed) if needed else 0
        batch = training.batch_size
        kept = min(training.keep_checkpoints, math.ceil(images / training.checkpoint_every_images))
        workers = self.config.resources.train.workers
        held = min(self.outlook.rows.get("train", 0) * self.raw, training.memory_budget_mb << 20)
        return StagePlan(
            stage="train",
            state=work.state,
            images=images,
            steps=math.ceil(images / batch),
            bytes=round(kept * figures["checkpoint_bytes"] + figures["bundle_bytes"]),
            seconds=part.ready_s
            + self.ray_s
            + figures["record_s"]
            + figures["begin_s"]
            + looping
            + figures["finish_s"],
            memory_bytes=RAY_BYTES + workers * (part.peak_bytes + held),
            gpu_memory_bytes=part.peak_gpu_bytes,
        )

    def _evaluate(self) -> StagePlan:
        work = self.outlook.work["evaluate"]
        config = self.config.evaluation
        sampled = self._sampled("evaluate", work.images, config.batch_size, config.sampler.steps)
        return sampled.model_copy(
            update={"seconds": sampled.seconds + self._reference(work.images) + self._measuring(work.images)}
        )

    def _reference(self, samples: int) -> float:
        """Seconds of the extractor's training and of the real images' features, which a dataset version needs once."""
        config, figures = self.config.evaluation, self.trial["figures"].figures
        learning, looking = 0.0, samples
        if not self.outlook.extractor:
            looking += self.outlook.rows.get("train", 0)
            if config.extractor is Extractor.classifier or self.outlook.class_names:
                learning = config.classifier.images / figures["extractor_images_per_second"]
        return learning + looking / figures["features_per_second"]

    def _measuring(self, samples: int) -> float:
        """Seconds of the features and the figures of a model's images, in the program of the job alone."""
        part = self.trial["figures"]
        looked = samples / part.figures["features_per_second"]
        return part.ready_s + looked + part.figures["figures_s"] + self._held_out()

    def _held_out(self) -> float:
        """Seconds of likelihood and inversion, which the program of the job computes alone, by network evaluations."""
        config, part = self.config.evaluation, self.trial["sample"]
        likelihood, inversion = config.likelihood, config.inversion
        each = 1 if likelihood.method is LikelihoodMethod.BOUND else EXACT_STEP * likelihood.probes
        evaluations = likelihood.images * likelihood.steps * each
        evaluations += inversion.images * inversion.steps * (1 + inversion.iterations)
        return evaluations * part.workers / (part.figures["evaluate_images_per_second"] * config.sampler.steps)

    def _register(self) -> StagePlan:
        """Its own work is MLflow's; a champion is measured again where the dataset is a new one."""
        seconds = FOUND_S + (self.trial["train"].figures["record_s"] if "train" in self.trial else FOUND_S)
        if self.outlook.has_champion and self.outlook.work["shard"].state is not State.done:
            config = self.config.evaluation
            again = self._sampled("evaluate", self.outlook.samples, config.batch_size, config.sampler.steps)
            seconds += again.seconds + self._measuring(self.outlook.samples)
        copied = round(self.trial["train"].figures["bundle_bytes"]) if "train" in self.trial else 0  # for MLflow
        state = self.outlook.work["register"].state
        return StagePlan(stage="register", state=state, bytes=copied, seconds=seconds)

    def _generate(self) -> StagePlan:
        work, config = self.outlook.work["generate"], self.config.generation
        return self._sampled("generate", work.images, config.batch_size, config.sampler.steps)

    def _sampled(self, stage: str, images: int, batch: int, steps: int) -> StagePlan:
        """Images that a pool of workers makes, in whole batches."""
        part, workers = self.trial["sample"], getattr(self.config.resources, stage).workers
        batches = math.ceil(images / batch)
        rounds = math.ceil(batches / workers)
        rate = _rate(part, f"{stage}_images_per_second", workers)
        return StagePlan(
            stage=stage,
            state=self.outlook.work[stage].state,
            images=images,
            steps=batches * steps,
            bytes=images * self.raw,
            seconds=part.ready_s + self.ray_s + rounds * workers * batch / rate,
            memory_bytes=RAY_BYTES + workers * part.peak_bytes,
            gpu_memory_bytes=part.peak_gpu_bytes,
        )


def _rate(part: PartResult, figure: str, workers: int) -> float:
    """Images a second of all workers. More than the trial had are on other machines, which do not share its cores."""
    return part.figures[figure] * max(1.0, workers / part.workers)
