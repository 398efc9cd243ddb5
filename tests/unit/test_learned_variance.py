"""A learned variance: twice the channels, read in one place, and asked for by the ancestral sampler alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_core.bundle import BundleConfig, DatasetReference, load_bundle, save_bundle
from diffusion_core.config import UserError
from diffusion_core.diffusion import (
    Denoiser,
    GaussianProcess,
    GuidanceConfig,
    KeyedNoise,
    ProcessConfig,
    SamplerConfig,
    SamplerKind,
    build_sampler,
    make_process,
    make_sampler,
    make_schedule,
)
from diffusion_core.networks import UNetConfig, build_network
from diffusion_core.store import Directory
from diffusion_core.training.run import check_start

LEARNED = ProcessConfig.model_validate({"variance": "learned_range", "timesteps": 50})
TINY = UNetConfig(base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1)


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Labelled:
    """Prediction and variance depend on the label; remembers how many images it was asked for."""

    null_label = 10

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, x_t: Tensor, t: Tensor, /, label: Tensor) -> Tensor:
        self.asked += len(x_t)
        shift = label.to(x_t)[:, None, None, None] / 10
        return torch.cat((0.1 * x_t + shift, torch.tanh(x_t) * (1 - shift)), dim=1)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["linear", "cosine", "sigmoid"]),
    timesteps=st.integers(2, 200),
    data=st.data(),
    v=st.floats(-1, 1),
)
def test_the_variance_is_interpolated_in_logarithm(kind: str, timesteps: int, data: st.DataObject, v: float) -> None:
    """-1 is the posterior's variance, 1 that of the forward step, and between them it rises."""
    t = data.draw(st.integers(1, timesteps - 1))
    schedule = make_schedule(kind, timesteps)
    x0, x_t = images(), images(seed=1)
    made = {name: GaussianProcess(schedule, variance=name) for name in ("fixed_small", "fixed_large", "learned_range")}
    small, large = (made[name].p_step(x0, x_t, t) for name in ("fixed_small", "fixed_large"))
    _, fraction = made["learned_range"].split(torch.full((4, 4, 4, 4), v, dtype=torch.float64))
    assert fraction is not None
    learned = made["learned_range"].p_step(x0, x_t, t, fraction=fraction)
    expected = (1 + v) / 2 * large.log_variance + (1 - v) / 2 * small.log_variance
    torch.testing.assert_close(learned.log_variance, expected.expand_as(x0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learned.variance, torch.exp(expected).expand_as(x0), rtol=1e-12, atol=0)
    assert torch.equal(learned.mean, small.mean)


def test_the_first_step_lies_between_the_floor_and_beta() -> None:
    process = GaussianProcess(make_schedule("linear"), variance="learned_range")
    floor = process.posterior(images(), images(), 0).log_variance
    low = process.p_step(images(), images(), 0, fraction=torch.zeros(()))
    high = process.p_step(images(), images(), 0, fraction=torch.ones(()))
    torch.testing.assert_close(low.log_variance, floor)
    assert float(high.log_variance) == pytest.approx(math.log(1e-4))


def test_a_missing_or_odd_variance_is_refused() -> None:
    process = make_process(LEARNED)
    with pytest.raises(ValueError, match="needs `fraction`"):
        process.p_step(images(), images(), 5)
    with pytest.raises(ValueError, match="twice the channels of the images, not 3"):
        process.split(torch.zeros(1, 3, 2, 2))
    sampler = build_sampler(SamplerConfig(kind=SamplerKind.DDPM, steps=3), process)
    with pytest.raises(ValueError, match="needs a learned variance"):
        sampler.sample(lambda x, t: x, images(), KeyedNoise(0, torch.arange(4)))
    fixed = Denoiser(GaussianProcess(make_schedule("linear", 50)), lambda x, t, /: x)
    with pytest.raises(ValueError, match="needs a learned variance"):
        sampler.sample(fixed, images(), KeyedNoise(0, torch.arange(4)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_of_the_prediction_and_the_variance_stays_that_of_the_label(scale: float, rescale: float) -> None:
    label, x_t, network = torch.tensor([0, 3, 7, 9]), images(), Labelled()
    learned = make_process(LEARNED)
    fixed = GaussianProcess(learned.schedule)
    guidance = GuidanceConfig(scale=scale, rescale=rescale)
    got = Denoiser(learned, network, {"label": label}, guidance).estimate(x_t, 20)

    class First(Labelled):
        def __call__(self, x_t: Tensor, t: Tensor, /, label: Tensor) -> Tensor:
            return super().__call__(x_t, t, label=label).chunk(2, dim=1)[0]

    expected = Denoiser(fixed, First(), {"label": label}, guidance)
    torch.testing.assert_close(got.x0_hat, expected(x_t, 20))
    assert expected.estimate(x_t, 20).fraction is None
    told = torch.full_like(label, 10) if scale == 0 else label
    v = network(x_t, torch.tensor(20), label=told).chunk(2, dim=1)[1]
    torch.testing.assert_close(got.fraction, (v + 1) / 2)


def test_a_guide_brings_its_prediction_but_not_its_variance() -> None:
    """Autoguidance of two networks that learned their variances."""
    label, x_t, network = torch.tensor([0, 3, 7, 9]), images(), Labelled()

    class Weaker(Labelled):
        def __call__(self, x_t: Tensor, t: Tensor, /, label: Tensor) -> Tensor:
            return 0.5 * super().__call__(x_t, t, label=label)

    process = make_process(LEARNED)
    got = Denoiser(process, network, {"label": label}, GuidanceConfig(scale=2.0), guide=Weaker()).estimate(x_t, 20)
    (better, fraction), (weaker, _) = (
        process.split(net(x_t, torch.tensor(20), label=label)) for net in (network, Weaker())
    )
    torch.testing.assert_close(got.x0_hat, process.predict_x0(x_t, 20, 2.0 * better - weaker))
    torch.testing.assert_close(got.fraction, fraction)


@pytest.mark.parametrize("kind", list(SamplerKind))
def test_every_sampler_takes_such_a_network_and_asks_it_as_often(kind: SamplerKind) -> None:
    process, network, noise = make_process(LEARNED), Labelled(), KeyedNoise(0, torch.arange(4))
    sampler = build_sampler(SamplerConfig(kind=kind, steps=5), process)
    denoiser = Denoiser(process, network, {"label": torch.tensor([0, 3, 7, 9])}, threshold="static")
    x = sampler.sample(denoiser, noise.initial((2, 4, 4)), noise)
    assert x.shape == (4, 2, 4, 4)
    assert bool(torch.isfinite(x).all())
    assert network.asked == 4 * sampler.evaluations


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_at_its_ends_it_samples_as_the_fixed_ones(v: float, variance: str) -> None:
    schedule, noise = make_schedule("cosine", 50), KeyedNoise(0, torch.arange(4))

    def network(x: Tensor, t: Tensor, /) -> Tensor:
        return torch.cat((torch.tanh(x), torch.full_like(x, v)), dim=1)

    learned = Denoiser(GaussianProcess(schedule, "epsilon", "learned_range"), network)
    fixed = Denoiser(GaussianProcess(schedule), lambda x, t, /: torch.tanh(x))
    x = make_sampler("ddpm", schedule, 7, variance="learned_range").sample(learned, images(), noise)
    expected = make_sampler("ddpm", schedule, 7, variance=variance).sample(fixed, images(), noise)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


def test_a_bundle_brings_the_wider_network_along(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = BundleConfig(
        process=LEARNED,
        network=TINY,
        image_shape=(8, 8, 3),
        dataset=DatasetReference(name="toys", version="abc", uri="/somewhere"),
        run_id="r1",
        images_seen=1,
    )
    weights = build_network(TINY, (8, 8, 3), 0, LEARNED.output_channels(3)).state_dict()
    save_bundle(Directory(tmp_path), config, weights, b"png")
    bundle = load_bundle(str(tmp_path))
    assert bundle.network(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 6, 8, 8)
    estimate = Denoiser(bundle.process, bundle.network).estimate(torch.zeros(1, 3, 8, 8), 5)
    assert estimate.fraction is not None
    assert float(estimate.fraction.mean()) == 0.5  # an untrained network puts out zeros: the geometric mean
    with pytest.raises(UserError, match="has the variance learned_range, and this run has fixed_small"):
        check_start(config, TINY, ProcessConfig(), 3)
    check_start(config, TINY, LEARNED, 3)
