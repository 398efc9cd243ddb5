"""Does the whole thing learn? A real, shorter run on the real digits has to give legible and varied images."""

from __future__ import annotations

import pytest

from diffusion_core.generation import open_imageset
from diffusion_core.jobs.backend import run_job
from diffusion_core.jobs.requests import GenerateRequest, GenerateResult, ShardResult, TrainResult
from flows.settings import load_config
from tests.digits_quality import legible, recall

SHORTER = ["training.images=48000", "training.preview_every_images=0", "training.checkpoint_every_images=48000"]

LEARNED_VARIANCE = [
    "process.variance=learned_range",
    "training.objective.loss=hybrid",
    "generation.sampler={kind: ddpm, steps: 100}",
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chosen", [[], LEARNED_VARIANCE])
def test_generated_digits_are_legible_and_varied(ray_cluster: object, store: str, chosen: list[str]) -> None:
    config = load_config("digits", settings=[*SHORTER, *chosen], shortcuts={"store": store})
    dataset = run_job("shard", config.shard_request(), ShardResult, config.backend)
    run = run_job("train", config.train_request(dataset), TrainResult, config.backend)
    request = GenerateRequest(
        store=store, resources=config.resources.generate, model=run.bundle_uri, generation=config.generation
    )
    made = run_job("generate", request, GenerateResult, config.backend)
    images, labels = open_imageset(made.uri).read(0, 1000)
    assert images.shape == (1000, 8, 8, 1)
    assert legible(images, labels) >= 0.95
    assert recall(images) >= 0.6
