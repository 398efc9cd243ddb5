"""Samplers against analytic truths: an exact denoiser of Gaussian data, and the formulas of the papers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion import (
    Denoiser,
    GaussianProcess,
    GuidanceConfig,
    KeyedNoise,
    NoiseSchedule,
    ProcessConfig,
    SamplerConfig,
    SamplerKind,
    Spacing,
    build_sampler,
    make_process,
    make_sampler,
    make_schedule,
)
from diffusion_core.diffusion.samplers import AncestralSampler, DDIMSampler, Move, Sampler, Step
from diffusion_core.networks import UNetConfig, build_network

MEAN, STD = 0.3, 0.5
quick = settings(max_examples=30, deadline=None)


class NoNoise:
    """Fails when it is asked for noise."""

    def normal(self, *args: object, **options: object) -> Tensor:
        raise AssertionError("noise was drawn")


class CountedNoise(KeyedNoise):
    """Remembers which steps drew noise."""

    def __init__(self, n: int) -> None:
        super().__init__(0, torch.arange(n))
        self.steps: list[int] = []

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float32):  # type: ignore[no-untyped-def]
        self.steps.append(step)
        return super().normal(shape, step, draw, device, dtype)


class GaussianDenoiser:
    """E[x0 | x_t] for data N(MEAN, STD**2), exact."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def gain(self, t: float) -> float:
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        return MEAN + self.gain(t) * (x_t - float(self.schedule.alpha(t)) * MEAN)


class Given:
    """Noise that is always the same."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def normal(self, *args: object, **options: object) -> Tensor:
        return self.z


def stepped(sampler: Sampler, x_t: Tensor, x0_hat: Tensor, t: float, s: float, z: Tensor) -> Tensor:
    """One step from t to s that is not the last."""
    return sampler.step(Move(0, 2, (t, s), x_t, lambda x, t: x0_hat, Given(z)))


def start(n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return KeyedNoise(seed, torch.arange(n)).initial((1, 2, 2), dtype=dtype)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 7, 10, 333])
def test_ddim_is_euler_on_the_probability_flow_ode(kind: str, steps: int) -> None:
    """d(x / alpha) = epsilon d(sigma / alpha) (Song et al. 2020, eq. 14), one Euler step for each pair of times."""
    schedule = make_schedule(kind)
    denoiser, x = GaussianDenoiser(schedule), start()
    times = [*schedule.times(steps), schedule.t_clean]
    scaled = x / schedule.alpha(times[0])
    for t, s in pairwise(times):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = scaled * alpha
        epsilon = (x_t - alpha * denoiser(x_t, t)) / sigma
        scaled = scaled + epsilon * (schedule.sigma(s) / schedule.alpha(s) - sigma / alpha)
    got = make_sampler("ddim", schedule, steps).sample(denoiser, x, NoNoise())
    torch.testing.assert_close(got, scaled, rtol=1e-9, atol=1e-9)


def test_ddim_converges_to_the_exact_flow_at_first_order() -> None:
    """The flow of Gaussian data is known: it keeps (x_t - alpha_t MEAN) / sqrt(alpha_t**2 STD**2 + sigma_t**2)."""
    schedule = make_schedule("cosine", 4000)
    x, denoiser = start(), GaussianDenoiser(schedule)
    alpha, sigma = float(schedule.alpha(3999)), float(schedule.sigma(3999))
    exact = MEAN + STD * (x - alpha * MEAN) / math.sqrt(alpha**2 * STD**2 + sigma**2)
    errors = [
        float((make_sampler("ddim", schedule, steps).sample(denoiser, x) - exact).abs().max())
        for steps in (125, 250, 500, 1000)
    ]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(0.75 < slope < 1.25 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize(
    ("kind", "options"), [("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {"eta": 0.6})]
)
def test_stochastic_samplers_have_the_moments_of_their_chain(kind: str, options: dict[str, object], steps: int) -> None:
    """With a linear denoiser every step maps N(m, v) to a Gaussian that is known in closed form."""
    schedule = make_schedule("cosine")
    denoiser, sampler = GaussianDenoiser(schedule), make_sampler(kind, schedule, steps, **options)
    n = 20_000
    x = sampler.sample(denoiser, KeyedNoise(1, torch.arange(n)).initial((1, 1, 1)), KeyedNoise(1, torch.arange(n)))
    mean, variance = 0.0, 1.0
    for index, (t, s) in enumerate(sampler.intervals):
        alpha_t, alpha_s = float(schedule.alpha(t)), float(schedule.alpha(s))
        var_t, var_s = float(schedule.sigma(t)) ** 2, float(schedule.sigma(s)) ** 2
        forward = var_t - alpha_t**2 / alpha_s**2 * var_s
        small = forward * var_s / var_t
        added = {"ddpm": forward if options else small, "ddim": 0.36 * small}[kind]
        last = index == steps - 1
        added = 0.0 if last else added
        if kind == "ddpm":
            on_x, on_x0 = alpha_t / alpha_s * var_s / var_t, alpha_s * forward / var_t
        else:
            on_x = math.sqrt(var_s - added) / math.sqrt(var_t)
            on_x0 = alpha_s - on_x * alpha_t
        gain = denoiser.gain(t)
        slope, offset = on_x + on_x0 * gain, on_x0 * MEAN * (1 - gain * alpha_t)
        mean, variance = slope * mean + offset, slope**2 * variance + added
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert float(x.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_the_whole_chain_reaches_the_data() -> None:
    schedule, n = make_schedule("cosine", 400), 8000
    for kind, options in (("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {})):
        noise = KeyedNoise(2, torch.arange(n))
        x = make_sampler(kind, schedule, 400, **options).sample(
            GaussianDenoiser(schedule), noise.initial((1, 1, 1)), noise
        )
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
        assert float(x.std()) == pytest.approx(STD, rel=0.04)


@quick
@given(timesteps=st.integers(2, 200), data=st.data(), clip=st.booleans())
def test_ddim_with_eta_one_is_ancestral_sampling(timesteps: int, data: st.DataObject, clip: bool) -> None:
    """Its variance is the posterior's, and it agrees image by image, for steps that divide T or not, clipped or not."""
    steps = data.draw(st.integers(1, timesteps))
    schedule, noise = make_schedule("linear", timesteps), KeyedNoise(0, torch.arange(6))
    exact = GaussianDenoiser(schedule)

    def denoiser(x: Tensor, t: float) -> Tensor:
        return (5 * exact(x, t)).clamp(-1, 1) if clip else exact(x, t)

    ddim = make_sampler("ddim", schedule, steps, eta=1.0).sample(denoiser, start(), noise)
    ddpm = make_sampler("ddpm", schedule, steps).sample(denoiser, start(), noise)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_noise_of_ddim_has_the_variance_of_equation_16(eta: float) -> None:
    schedule = make_schedule("linear")
    sampler = DDIMSampler(schedule, 7, eta=eta)
    x, x0 = start(), torch.zeros(6, 1, 2, 2, dtype=torch.float64)
    for t, s in sampler.intervals[:-1]:
        bar_t, bar_s = float(schedule.alpha(t)) ** 2, float(schedule.alpha(s)) ** 2
        one = torch.ones_like(x)
        scale = float((stepped(sampler, x, x0, t, s, one) - stepped(sampler, x, x0, t, s, 0 * one)).mean())
        assert scale**2 == pytest.approx(eta**2 * (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s), rel=1e-9)


def test_epsilon_is_derived_again_from_a_clipped_x0() -> None:
    schedule = make_schedule("linear")
    x_t, clipped = start() * 3, torch.ones(6, 1, 2, 2, dtype=torch.float64)
    t, s = 800.0, 600.0
    epsilon = (x_t - schedule.alpha(t) * clipped) / schedule.sigma(t)
    got = stepped(DDIMSampler(schedule, 5), x_t, clipped, t, s, start())
    torch.testing.assert_close(got, schedule.alpha(s) * clipped + schedule.sigma(s) * epsilon)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(
    ("kind", "options"), [("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {"eta": 1.0})]
)
def test_the_last_step_has_no_noise_and_is_the_denoisers_estimate(
    kind: str, options: dict[str, object], steps: int
) -> None:
    schedule, noise = make_schedule("cosine"), CountedNoise(6)
    seen: list[Step] = []
    x = make_sampler(kind, schedule, steps, **options).sample(GaussianDenoiser(schedule), start(), noise, seen.append)
    assert noise.steps == list(range(steps - 1))
    torch.testing.assert_close(x, seen[-1].x0_hat, rtol=1e-12, atol=1e-12)
    assert [step.index for step in seen] == list(range(steps))
    assert seen[-1].s == schedule.t_clean
    assert seen[0].t == 999


def test_deterministic_ddim_needs_no_noise_and_others_say_so() -> None:
    schedule = make_schedule("cosine")
    make_sampler("ddim", schedule, 5).sample(GaussianDenoiser(schedule), start())
    make_sampler("ddim", schedule, 5).sample(GaussianDenoiser(schedule), start(), NoNoise())
    with pytest.raises(ValueError, match="KeyedNoise"):
        make_sampler("ddpm", schedule, 5).sample(GaussianDenoiser(schedule), start())


@pytest.mark.parametrize("kind", list(SamplerKind))
def test_a_network_and_labels_and_guidance_and_all(kind: SamplerKind) -> None:
    """From noise to pixels through a real network; half of the batch gives the same half."""
    torch.manual_seed(0)
    network = build_network(UNetConfig(base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1), (8, 8, 1), 3)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    network.eval()
    config = SamplerConfig(kind=kind, steps=6, eta=0.5 if kind is SamplerKind.DDIM else 0.0)
    process = make_process(ProcessConfig(timesteps=100))
    sampler = build_sampler(config, process)

    def images(ids: Tensor) -> Tensor:
        noise = KeyedNoise(0, ids)
        denoiser = Denoiser(process, network, {"label": ids % 3}, GuidanceConfig(scale=2), config)
        return sampler.sample(denoiser, noise.initial((1, 8, 8)), noise)

    whole = images(torch.arange(4))
    assert whole.shape == (4, 1, 8, 8)
    assert not whole.requires_grad
    assert float(whole.abs().max()) <= 1
    torch.testing.assert_close(images(torch.arange(2)), whole[:2], rtol=1e-4, atol=1e-4)


def test_configuration_reaches_the_sampler() -> None:
    process = make_process(ProcessConfig.model_validate({"variance": "fixed_large", "timesteps": 100}))
    ddpm = build_sampler(SamplerConfig(kind=SamplerKind.DDPM, steps=10, spacing=Spacing.LEADING), process)
    assert isinstance(ddpm, AncestralSampler)
    assert ddpm.variance == "fixed_large"
    assert ddpm.times == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    ddim = build_sampler(SamplerConfig(steps=4, eta=0.25), process)
    assert isinstance(ddim, DDIMSampler)
    assert ddim.eta == 0.25
    assert ddim.times == process.schedule.times(4)


def test_impossible_samplers_are_refused() -> None:
    schedule = make_schedule("linear", 10)
    with pytest.raises(UserError, match=r"sampler\.kind: 'rk45'.*ddpm, ddim"):
        make_sampler("rk45", schedule, 5)
    with pytest.raises(UserError, match="steps: 11"):
        make_sampler("ddim", schedule, 11)
    with pytest.raises(UserError, match="eta"):
        make_sampler("ddim", schedule, 5, eta=1.5)
    for times in ([3.0, 5.0], [5.0, 5.0], [5.0, -1.0], [5.0]):
        with pytest.raises(UserError, match="2 descending times"):
            make_sampler("ddim", schedule, 2, times=times)
    with pytest.raises(ValueError, match="only the sampler ddim"):
        SamplerConfig(kind=SamplerKind.DDPM, eta=0.5)


def test_times_may_be_given() -> None:
    schedule = make_schedule("linear")
    got = make_sampler("ddim", schedule, 3, times=[900.5, 400.25, 3.0])
    assert got.intervals == [(900.5, 400.25), (400.25, 3.0), (3.0, -1.0)]
    x = got.sample(GaussianDenoiser(schedule), start())
    assert bool(np.isfinite(x.numpy()).all())


def test_a_denoiser_of_a_process_samples_like_the_exact_one() -> None:
    """The network that predicts the exact noise makes the same images as the exact denoiser."""
    schedule = make_schedule("linear")
    process, exact = GaussianProcess(schedule), GaussianDenoiser(schedule)

    def network(x_t: Tensor, t: Tensor, /) -> Tensor:
        time = float(t[0])
        return (x_t - schedule.alpha(time) * exact(x_t, time)) / schedule.sigma(time)

    sampler = make_sampler("ddim", schedule, 20)
    torch.testing.assert_close(sampler.sample(Denoiser(process, network), start()), sampler.sample(exact, start()))
