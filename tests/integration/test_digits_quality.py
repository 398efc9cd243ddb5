"""Does the whole thing learn? Real, shorter runs on the real digits have to give legible and varied images."""

from __future__ import annotations

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

SHORTER = [
    "training.images=32000",
    "training.ema_halflife_images=5000",
    "training.time_budget_s=null",
    "training.preview_every_images=0",
    "training.checkpoint_every_images=64000",
]
METHODS = {
    "digits": ["training.images=48000"],
    "digits-v": [],
    "digits-edm": [],
    "digits-flow": [],
    "digits-learned-variance": [],
    "digits-dit": ["training.images=48000"],
}
CLASSIFIER = [
    "network.kind=classifier",
    "training.images=64000",
    "training.warmup_images=2560",
]
CLASSIFIER_SCALE = 10.0


@pytest.fixture(scope="module")
def place(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A store, and the digits in it."""
    store = Directory(tmp_path_factory.mktemp("digits") / "store").uri
    config = load_config("digits", shortcuts={"store": store})
    return store, run_job("shard", ShardRequest.of(config), ShardResult, config.backend)


def test_every_preset_of_the_digits_is_tried() -> None:
    assert set(METHODS) == {name for name in preset_names() if name.startswith("digits")}


@pytest.mark.parametrize("preset", METHODS)
def test_generated_digits_are_legible_and_varied(place: Place, preset: str) -> None:
    config = configured(place, preset, METHODS[preset])
    images, labels = generated(config, trained(config, place))
    assert legible(images, labels) >= 0.95
    assert recall(images) >= 0.6


def test_a_classifier_of_noisy_images_makes_digits_legible_to_a_model_without_labels(place: Place) -> None:
    """Dhariwal & Nichol 2021, section 4: the model is not told the label, the gradient alone leads to it."""
    config = configured(place, chosen=METHODS["digits"])
    model = trained(config, place)
    classifier = trained(configured(place, chosen=CLASSIFIER), place)
    images, labels = generated(config, model, GuidanceConfig(scale=0.0))
    assert legible(images, labels) < 0.2, "the labels are known without the classifier"
    guidance = GuidanceConfig(scale=0.0, classifier=classifier, classifier_scale=CLASSIFIER_SCALE)
    images, labels = generated(config, model, guidance)
    assert legible(images, labels) >= 0.95
    assert recall(images) >= 0.6


def configured(place: Place, preset: str = "digits", chosen: list[str] | None = None) -> PipelineConfig:
    return load_config(preset, settings=[*SHORTER, *(chosen or [])], shortcuts={"store": place[0]})


def trained(config: PipelineConfig, place: Place) -> str:
    """The URI of the bundle; what another test has trained is found done."""
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
