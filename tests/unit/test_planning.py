"""What a plan says follows from what is there and from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion_core.data.sources import base
from diffusion_core.planning import plan, trial
from diffusion_core.planning.crew import PartResult, Trial
from diffusion_core.planning.estimate import FOUND_S, RAY_STARTS, StagePlan, estimate
from diffusion_core.planning.outlook import Outlook, State, Work, look
from diffusion_core.stages.settings import load_config
from tests.image_files import shard_here, write_images
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


def outlook(hash_s: float = 0.0, champion: bool = False, **work: Work) -> Outlook:
    usual = {name: Work(State.runs, images) for name, images in {"shard": 1000, "train": 640, "register": 0}.items()}
    rows = {"train": 900, "test": 100}
    every = {**usual, "evaluate": Work(State.runs, 100), "generate": Work(State.runs, 130), **work}
    return Outlook(every, (8, 8, 1), ("0", "1"), rows, hash_s, {}, samples=100, has_champion=champion)


def planned(*settings: str, **found: Any) -> dict[str, StagePlan]:
    rare = ["training.checkpoint_every_images=1000000", "training.preview_every_images=0"]
    config = load_config(
        "digits", settings=[*rare, "training.time_budget_s=null", "evaluation.classifier.images=2000", *settings]
    )
    return {stage.stage: stage for stage in estimate(config, outlook(**found), TRIAL)}


def test_each_stage_takes_its_start_and_its_images() -> None:
    found = planned("training.batch_size=64", "evaluation.batch_size=50")
    assert found["shard"].seconds == 1 + RAY_S + 1000 / 100 and found["shard"].bytes == 50_000
    assert found["train"].seconds == 1 + RAY_S + 3 + 2 + 640 / 64 + 5
    assert (found["train"].images, found["train"].steps) == (640, 10)
    measuring = 1 + 2000 / 1000 + (900 + 2 * 100) / 100 + 4
    assert found["evaluate"].seconds == pytest.approx(1 + RAY_S + 100 / 32 + measuring)
    # 130 images are 3 batches of 64, which two workers make in two rounds.
    assert found["generate"].seconds == 1 + RAY_S + 4 * 64 / 16 and found["generate"].steps == 3 * 25


def test_hashing_a_champion_and_a_cluster_that_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = planned("evaluation.batch_size=50")
    more = planned("evaluation.batch_size=50", hash_s=7.0, champion=True)
    assert more["shard"].seconds - usual["shard"].seconds == 7
    # The champion makes and is measured by its own images; extractor and real images are those of the evaluation.
    again = (1 + RAY_S + 100 / 32) + (1 + 100 / 100 + 4)
    assert more["register"].seconds - usual["register"].seconds == pytest.approx(again)
    assert planned(hash_s=7.0, shard=Work(State.done))["shard"].seconds == FOUND_S + 7
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert usual["shard"].seconds - planned()["shard"].seconds == RAY_S - 2


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
    fits, sentence = plan.judge_memory([small, large], 10 * GB, 16 * GB)
    assert not fits and sentence.endswith(
        "Of a GPU's 16.0 GB a worker of train takes 20.0 GB: it does not fit, ask for a smaller "
        "training.microbatch_size."
    )
    fits, sentence = plan.judge_memory([small, large], 10 * GB, 20 * GB)
    assert fits and sentence.endswith("takes 20.0 GB: it fits.")


def test_a_look_at_an_empty_store_writes_nothing(tmp_path: Path) -> None:
    found = look(load_config("digits", settings=SETTINGS, shortcuts={"store": str(tmp_path)}))
    assert {name: work.state for name, work in found.work.items()} == dict.fromkeys(found.work, State.runs)
    assert found.rows == {"train": 1438, "test": 359} and found.work["train"].images == 640
    assert found.work["evaluate"].images == 32 and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_planned_as_it_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = write_images(tmp_path / "source", [f"{i % 2}/{i:02d}.png" for i in range(40)]), base.hash_file

    def failing(place: Any, file: Any) -> str:
        if file.key == "1/03.png":
            raise PermissionError(13, "Permission denied")
        return real(place, file)

    monkeypatch.setattr(base, "hash_file", failing)
    settings = [*SETTINGS, "source.kind=folder", f"source.uri={root}"]
    config = load_config("digits", settings=settings, shortcuts={"store": str(tmp_path / "store")})
    before = look(config)
    assert before.work["shard"] == Work(State.runs, 39) and "1/03.png" not in before.digests
    order = trial.Order(
        config=config,
        folder=str(tmp_path / "trial"),
        image_shape=before.image_shape,
        class_names=before.class_names,
        samples=8,
        train_rows=8,
        digests=dict(before.digests),
    )
    trial.shard(order)
    dataset = shard_here(config.store, config.source, config.dataset)
    assert dict(dataset.rejected()) == {"1/03.png": "unreadable: Permission denied"}
    assert look(config).work["shard"].state is State.done
