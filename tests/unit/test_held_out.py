"""Figures of a model on held-out images, with a network that is exact: images of one grey level each, N(0, 0.4^2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_core.bundle import Bundle, BundleConfig, DatasetReference
from diffusion_core.config import UserError
from diffusion_core.data.shards import Batch, ImageDataset, write_dataset
from diffusion_core.diffusion import ObjectiveConfig, ProcessConfig, Variance, make_process
from diffusion_core.evaluation.config import EvaluationConfig, InversionConfig, LikelihoodConfig, check_held_out_figures
from diffusion_core.evaluation.inversion import inversion_error
from diffusion_core.evaluation.likelihood import IMPORTANCE_RANGES, held_out_likelihood
from diffusion_core.networks import UNetConfig

STD, TIMESTEPS = 0.4, 40


class ExactNetwork(nn.Module):
    """The best prediction of the noise for pixels that are independent and N(0, STD^2)."""

    def __init__(self, config: ProcessConfig) -> None:
        super().__init__()
        self.schedule = make_process(config).schedule
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (
            part(t.double()).to(x_t)[:, None, None, None] for part in (self.schedule.alpha, self.schedule.sigma)
        )
        return self.zero + sigma * x_t / (alpha**2 * STD**2 + sigma**2)


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    values = np.random.default_rng(0).normal(0, STD, (40, 4, 4, 1))
    images = np.clip(np.rint(127.5 * (values + 1)), 0, 255).astype(np.uint8)
    return write_dataset(tmp_path, "grey", {"train": Batch(images), "test": Batch(images)}, (), rows_per_shard=16)


@pytest.fixture
def bundle() -> Bundle:
    process = ProcessConfig(timesteps=TIMESTEPS)
    config = BundleConfig(
        process=process,
        network=UNetConfig(),
        image_shape=(4, 4, 1),
        dataset=DatasetReference(name="grey", version="v", uri="/nowhere"),
        run_id="r",
        images_seen=1,
    )
    return Bundle(config, make_process(process), ExactNetwork(process), "digest", "/nowhere")


def test_a_bound_of_all_timesteps_tells_which_of_them_to_train_at(bundle: Bundle, dataset: ImageDataset) -> None:
    """The table goes into `training.objective.importance` as it is, and does not depend on the batches."""
    wanted = LikelihoodConfig(images=40, steps=TIMESTEPS)
    found = held_out_likelihood(bundle, dataset, wanted, 7, 0)
    assert found.importance is not None and len(found.importance) == IMPORTANCE_RANGES
    assert found.importance == pytest.approx(held_out_likelihood(bundle, dataset, wanted, 40, 0).importance, rel=1e-4)
    assert ObjectiveConfig.model_validate({"times": "importance", "importance": found.importance})
    assert held_out_likelihood(bundle, dataset, LikelihoodConfig(images=40, steps=20), 40, 0).importance is None


def test_the_error_of_a_likelihood_is_its_standard_error(bundle: Bundle, dataset: ImageDataset) -> None:
    found = [held_out_likelihood(bundle, dataset, LikelihoodConfig(images=n, steps=4), 8, 0) for n in range(1, 7)]
    bits = np.diff([0.0, *(n * one.bits_per_dim for n, one in enumerate(found, 1))])
    assert found[0].error == 0.0
    assert found[-1].bits_per_dim == pytest.approx(bits.mean(), rel=1e-5)
    assert found[-1].error == pytest.approx(bits.std(ddof=1) / np.sqrt(6), rel=1e-3)


def test_images_come_back_out_of_their_noise(bundle: Bundle, dataset: ImageDataset) -> None:
    """In grey levels: the better the more steps, and the more evaluations of each."""
    rough, iterated, fine = (
        inversion_error(bundle, dataset, InversionConfig(images=40, steps=steps, iterations=iterations), 7)
        for steps, iterations in ((10, 1), (10, 3), (TIMESTEPS, 1))
    )
    assert 0 < iterated < rough / 2 and 0 < fine < rough / 2
    assert rough < 25


def test_a_bound_that_says_nothing_is_refused() -> None:
    """With the exact denoiser it would be 29 bits per dimension of images whose likelihood is 6.7."""
    exploding = ProcessConfig.model_validate({"schedule": "ve"})
    wanted = EvaluationConfig(likelihood=LikelihoodConfig(images=1))
    with pytest.raises(UserError, match=r"evaluation\.likelihood\.method: bound says nothing .* use exact"):
        check_held_out_figures("evaluation", wanted, exploding)
    check_held_out_figures("evaluation", EvaluationConfig(), exploding)
    check_held_out_figures("evaluation", wanted, exploding.model_copy(update={"variance": Variance.FIXED_LARGE}))
