"""What a plan says follows from what is there and from what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_core.planning import plan
from diffusion_core.planning.crew import PartResult, Trial
from diffusion_core.planning.estimate import FOUND_S, RAY_STARTS, StagePlan, estimate
from diffusion_core.planning.outlook import Outlook, State, Work, look
from diffusion_core.stages.settings import load_config
from tests.tiny_pipeline import SETTINGS

GB = 10**9


def part(workers: int = 2, **figures: float) -> PartResult:
    return PartResult(workers=workers, ready_s=1, figures=figures, peak_bytes=GB, peak_gpu_bytes=0)


TRIAL: Trial = {
    "ray": part(import_s=2.0),
    "shard": part(images_per_second=100, opened_s=0, bytes_per_image=50),
    "train": part(
        record_s=3, begin_s=2, images_per_second=64, save_s=1, finish_s=5, checkpoint_bytes=1000, bundle_bytes=100
    ),
    "sample": part(generate_images_per_second=16, evaluate_images_per_second=32),
    "figures": part(1, extractor_images_per_second=1000, features_per_second=100, figures_s=4),
}
RAY_S = RAY_STARTS * 2


def outlook(**work: Work) -> Outlook:
    usual = {name: Work(State.runs, images) for name, images in {"shard": 1000, "train": 640, "register": 0}.items()}
    rows = {"train": 900, "test": 100}
    every = {**usual, "evaluate": Work(State.runs, 100), "generate": Work(State.runs, 130), **work}
    return Outlook(every, (8, 8, 1), ("0", "1"), rows, 0, {}, samples=100)


def planned(*settings: str, **work: Work) -> dict[str, StagePlan]:
    rare = ["training.checkpoint_every_images=1000000", "training.preview_every_images=0"]
    config = load_config(
        "digits", settings=[*rare, "training.time_budget_s=null", "evaluation.classifier.images=2000", *settings]
    )
    return {stage.stage: stage for stage in estimate(config, outlook(**work), TRIAL)}


def test_each_stage_takes_its_start_and_its_images() -> None:
    found = planned("training.batch_size=64", "evaluation.batch_size=50")
    assert found["shard"].seconds == 1 + RAY_S + 1000 / 100 and found["shard"].bytes == 50_000
    assert found["train"].seconds == 1 + RAY_S + 3 + 2 + 640 / 64 + 5
    assert (found["train"].images, found["train"].steps) == (640, 10)
    measuring = 1 + 2000 / 1000 + (900 + 2 * 100) / 100 + 4
    assert found["evaluate"].seconds == pytest.approx(1 + RAY_S + 100 / 32 + measuring)
    # 130 images are 3 batches of 64, which two workers make in two rounds.
    assert found["generate"].seconds == 1 + RAY_S + 4 * 64 / 16 and found["generate"].steps == 3 * 25


def test_a_time_budget_caps_the_training_and_what_was_spent_counts() -> None:
    work = Work(State.continues, images=64_000, seconds=40)
    capped = planned("training.batch_size=64", "training.time_budget_s=100", train=work)["train"]
    assert capped.seconds == 1 + RAY_S + 3 + 2 + 60 + 5 and capped.images == 60 * 64
    saving = planned("training.batch_size=64", "training.checkpoint_every_images=6400", train=work)["train"]
    assert saving.seconds == 1 + RAY_S + 3 + 2 + 1000 + 10 + 5


def test_what_is_done_takes_seconds_and_needs_no_trial() -> None:
    every = {name: Work(State.done) for name in ("shard", "train", "evaluate", "register", "generate")}
    stages = estimate(load_config("digits"), outlook(**every), {})
    assert {stage.seconds for stage in stages} == {FOUND_S} and not any(stage.images for stage in stages)


def test_gpus_and_more_workers_than_the_trial_had() -> None:
    one = planned("resources.generate.gpus_per_worker=0.5")["generate"]
    assert one.gpu_hours == pytest.approx(one.seconds * 2 * 0.5 / 3600)
    four = planned("resources.generate.workers=4", "resources.generate.gpus_per_worker=0.5")["generate"]
    assert four.seconds == 1 + RAY_S + 4 * 64 / (16 * 2) and four.gpu_hours > one.gpu_hours / 2


def test_figures_of_held_out_images_count_as_evaluations_of_the_network() -> None:
    less = planned("evaluation.sampler.steps=10")["evaluate"].seconds
    settings = ["evaluation.likelihood.images=64", "evaluation.likelihood.steps=50", "evaluation.inversion.images=32"]
    more = planned("evaluation.sampler.steps=10", *settings)["evaluate"].seconds
    assert more - less == pytest.approx((64 * 50 + 32 * 50 * 2) / (32 * 10 / 2))


def test_memory_is_judged_by_the_hungriest_stage() -> None:
    small = StagePlan(stage="shard", state=State.runs, seconds=1, memory_bytes=GB)
    large = StagePlan(stage="train", state=State.runs, seconds=1, memory_bytes=9 * GB, gpu_memory_bytes=20 * GB)
    assert plan.judge_memory([small, large], 10 * GB, 0) == (
        True,
        "The most memory at once takes train, 9.0 GB of 10.0 GB: it fits.",
    )
    fits, sentence = plan.judge_memory([small, large], 8 * GB, 0)
    assert not fits and "fewer workers" in sentence
    assert plan.judge_memory([small, large], 10 * GB, 16 * GB)[0] is False


def test_a_look_at_an_empty_store_writes_nothing(tmp_path: Path) -> None:
    found = look(load_config("digits", settings=SETTINGS, shortcuts={"store": str(tmp_path)}))
    assert {name: work.state for name, work in found.work.items()} == dict.fromkeys(found.work, State.runs)
    assert found.rows == {"train": 1438, "test": 359} and found.work["train"].images == 640
    assert found.work["evaluate"].images == 32 and not list(tmp_path.iterdir())
