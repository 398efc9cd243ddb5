"""A schedule of 20 s on the stack fires by itself: it trains once, makes new images each time, and sees new data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_core.store import Directory
from tests import store_digests, tiny_pipeline
from tests.local_stack import LocalStack, diffusion, run, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

COUNT = 16
SETTINGS = [
    *tiny_pipeline.SETTINGS,
    "name=shades",
    "dataset.image_size=8",
    "dataset.channels=1",
    "dataset.test_fraction=0.4",
    "process.prediction=x0",  # what shade the images have is learned within a few steps
    "network.base_channels=8",
    "network.head_channels=8",
    "network.channel_multipliers=[1]",
    "network.attention_resolutions=[]",
    "training.batch_size=32",
    "training.microbatch_size=32",
    "training.images=1600",
    "training.checkpoint_every_images=1600",
    "training.learning_rate=0.02",
    "training.warmup_images=0",
    "training.ema_halflife_images=64",
    "evaluation.classifier.images=500",
    "evaluation.kid_subset_size=8",
    f"generation.count={COUNT}",
    "resources.train.workers=1",
]


@pytest.fixture
def stack(store: str) -> Iterator[LocalStack]:
    stack = LocalStack(store, "--ray")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


def _pictures(folder: Path, first: int, count: int, shade: int) -> None:
    """Pictures of two classes, in folders of their names."""
    random = np.random.default_rng(first)
    for number in range(first, first + count):
        place = folder / ("even", "odd")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(shade, shade + 40, (8, 8), dtype=np.uint8)
        pixels[:, :4] += 20 * (number % 2)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")


def _completed(stack: LocalStack, name: str) -> list[dict[str, Any]]:
    """The completed runs of a deployment, the earliest first. The schedule skips those for which there is no room."""
    asked = {
        "deployments": {"name": {"any_": [name]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}},
    }
    runs = sorted(stack.api("flow_runs/filter", asked), key=lambda each: each["start_time"])
    assert all(each["state"]["type"] == "COMPLETED" for each in runs), [each["state"] for each in runs]
    return runs


def _news(stack: LocalStack, of_run: dict[str, Any]) -> str:
    """The last sentence in the log of a pipeline's run, which arrives a moment after its end."""
    asked = {"logs": {"flow_run_id": {"any_": [of_run["id"]]}}}

    def said() -> list[str]:
        lines = [line["message"] for line in stack.api("logs/filter", asked)]
        return [line for line in lines if line.startswith(("Done:", "Nothing changed since"))]

    return str(wait_for(said, "the log", 30)[0])


def _check_new_each_time(store: str) -> None:
    """The larger set is that of the schedule, the smaller one what was measured."""
    sets: dict[str, list[str]] = {}
    for (set_id, _), digest in store_digests.images(store).items():
        sets.setdefault(set_id, []).append(digest)
    made = max(sets.values(), key=len)
    assert len(made) >= 3 * COUNT and len(set(made)) == len(made), "images were made twice"


def test_a_schedule_fires_trains_once_and_takes_what_is_new(stack: LocalStack, store: str, tmp_path: Path) -> None:
    place, source = Directory(store), tmp_path / "pictures"
    _pictures(source, 0, 80, shade=90)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    options = ["--interval", "20s", "--new-images", "--source", str(source), "--store", store, *settings]
    diffusion("schedule", "add", "often", "--preset", "digits", *options)

    runs = wait_for(lambda: len(found := _completed(stack, "often")) >= 3 and found, "three runs", 600)
    assert _news(stack, runs[0]).startswith("Done: shard, train, evaluate, ")
    for again in runs[1:3]:
        news = _news(stack, again)
        assert "Nothing changed since" in news and f"{COUNT} new images" in news
    assert len((place / "runs").children()) == 1
    assert {each["created_by"]["type"] for each in runs} == {"SCHEDULE"}
    _check_new_each_time(store)

    enabled = run("automation", "enable", "champion-generates", "--store", store)
    assert enabled.returncode == 0, enabled.stderr
    _pictures(source, 80, 240, shade=190)
    wait_for(lambda: len((place / "runs").children()) == 2, "another training", 300)
    diffusion("schedule", "pause", "often", "--store", store)
    made = wait_for(lambda: _completed(stack, "generate"), "what the automation generates", 400)
    assert made[0]["created_by"]["type"] == "AUTOMATION"
    assert made[0]["parameters"]["model"] == "shades/2"
