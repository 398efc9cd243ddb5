"""Does the whole thing learn? The demo as a newcomer runs it, and each other method in a shorter, narrower run.

Real digits, real training: the images have to be legible and varied.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import numpy as np
import pytest

from diffusion_core.diffusion.config import GuidanceConfig
from diffusion_core.generation import open_imageset
from diffusion_core.jobs.backend import run_job
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.stages.settings import load_config, preset_names
from diffusion_core.stages.shard import ShardRequest, ShardResult
from diffusion_core.stages.train import TrainRequest, TrainResult
from diffusion_core.store import Directory
from tests.digits_quality import legible, recall

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Place = tuple[str, ShardResult]
Demo = tuple[str, dict[str, Any]]

STAGES = ("dataset", "run", "evaluation", "version", "images")
SHORTER = [
    "training.images=32000",
    "training.ema_halflife_images=5000",
    "training.time_budget_s=null",
    "training.preview_every_images=0",
    "training.checkpoint_every_images=64000",
    "resources.train.workers=1",  # the same numbers as of two, which wait for each other where other tests run too
    "resources.generate.workers=1",
]
NARROWER = ["network.base_channels=16", "network.head_channels=16"]
FASTER = [*NARROWER, "training.learning_rate=0.004", "training.warmup_images=6400"]
METHODS = {
    "digits-v": FASTER,
    "digits-edm": FASTER,
    "digits-flow": FASTER,
    "digits-learned-variance": FASTER,
    "digits-dit": ["network.width=64", "training.images=48000"],
}
CLASSIFIER = [
    "network.kind=classifier",
    *NARROWER,
    "training.images=64000",
    "training.learning_rate=0.004",
    "training.warmup_images=2560",
]
CLASSIFIER_SCALE = 10.0


@pytest.fixture(scope="module")
def place(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A store, and the digits in it."""
    store = Directory(tmp_path_factory.mktemp("digits") / "store").uri
    config = load_config("digits", shortcuts={"store": store})
    return store, run_job("shard", ShardRequest.of(config), ShardResult, config.backend)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, python: str) -> Demo:
    """The store of the demo, and its result. It has a temporary Prefect server and a Ray of its own."""
    store = Directory(tmp_path_factory.mktemp("demo") / "store").uri
    return store, run_demo(store, python)


def run_demo(store: str, python: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [python, "-m", "flows.cli", "demo", "--store", store, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.timeout(1500)
def test_the_demo_works_and_the_second_finds_everything_done(demo: Demo, python: str) -> None:
    store, first = demo
    assert [first[stage]["reused"] for stage in STAGES] == [False] * 5
    assert first["version"]["promoted"]
    images, labels = open_imageset(first["images"]["uri"]).read(0, 1000)
    assert images.shape == (1000, 8, 8, 1)
    assert legible(images, labels) >= 0.95
    assert recall(images) >= 0.6
    second = run_demo(store, python)
    assert [second[stage]["reused"] for stage in STAGES] == [True] * 5
    assert second["images"]["uri"] == first["images"]["uri"]


def test_every_preset_of_the_digits_is_tried() -> None:
    assert {"digits", *METHODS} == {name for name in preset_names() if name.startswith("digits")}


@pytest.mark.parametrize("preset", METHODS)
def test_generated_digits_are_legible_and_varied(place: Place, preset: str) -> None:
    config = configured(place, preset, METHODS[preset])
    images, labels = generated(config, trained(config, place))
    assert legible(images, labels) >= 0.95
    assert recall(images) >= 0.6


@pytest.mark.timeout(1500)
def test_a_classifier_of_noisy_images_makes_digits_legible_to_a_model_without_labels(place: Place, demo: Demo) -> None:
    """Dhariwal & Nichol 2021, section 4: the model is not told the label, the gradient alone leads to it."""
    config = configured(place, "digits", [])
    model = demo[1]["run"]["bundle_uri"]
    classifier = trained(configured(place, "digits", CLASSIFIER), place)
    images, labels = generated(config, model, GuidanceConfig(scale=0.0))
    assert legible(images, labels) < 0.2, "the labels are known without the classifier"
    guidance = GuidanceConfig(scale=0.0, classifier=classifier, classifier_scale=CLASSIFIER_SCALE)
    images, labels = generated(config, model, guidance)
    assert legible(images, labels) >= 0.95
    assert recall(images) >= 0.6


def configured(place: Place, preset: str, chosen: list[str]) -> PipelineConfig:
    return load_config(preset, settings=[*SHORTER, *chosen], shortcuts={"store": place[0]})


def trained(config: PipelineConfig, place: Place) -> str:
    """The URI of the bundle."""
    return run_job("train", TrainRequest.of(config, place[1].uri), TrainResult, config.backend).bundle_uri


def generated(
    config: PipelineConfig, model: str, guidance: GuidanceConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """1,000 images, and the labels that they should have."""
    generation = config.generation.model_copy(update={"guidance": guidance or config.generation.guidance})
    request = GenerateRequest(
        store=config.store, resources=config.resources.generate, model=model, generation=generation
    )
    made = run_job("generate", request, GenerateResult, config.backend)
    images, labels = open_imageset(made.uri).read(0, 1000)
    assert images.shape == (1000, 8, 8, 1)
    return images, labels
