"""Grids of times, noise levels and weights against the installed `diffusers`; where they differ, who is right."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_core.diffusion import (
    Denoiser,
    DiscreteSchedule,
    GaussianProcess,
    GuidanceConfig,
    Objective,
    ObjectiveConfig,
    ProcessConfig,
    make_sampler,
    make_schedule,
    training_times,
)
from diffusion_core.diffusion.denoiser import dynamic_threshold
from diffusion_core.diffusion.samplers import Move
from diffusion_core.diffusion.samplers.predictor_corrector import PredictorCorrectorSampler

diffusers = pytest.importorskip("diffusers")

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
MANY = [*range(1, 70), 100, 111, 125, 144, 192, 200, 250, 333, 334, 500, 501, 667, 999, 1000]  # divide 1000 or not


def peers_times(spacing: str, steps: int) -> list[int]:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


def test_trailing_times_are_the_peers_but_for_its_rounding_of_halves() -> None:
    """round(T - i * T / n) - 1 (Lin et al. 2024, table 2). Where that lies halfway between two timesteps, the peer, who
    adds up T / n in floating point, may land on either side. Ours is the even one, as if there were no rounding. For
    61 steps it even makes 62, the last of them the timestep -1.
    """
    schedule, halves = make_schedule("linear"), 0
    for steps in MANY:
        exact = [1000 - Fraction(1000 * i, steps) for i in range(steps)]
        ours, theirs = schedule.times(steps), peers_times("trailing", steps)
        assert ours == [round(t) - 1 for t in exact], steps
        assert theirs[steps:] == ([-1] if steps == 61 else [])
        for t, one, other in zip(exact, ours, theirs[:steps], strict=True):
            assert one == other or (t.denominator == 2 and abs(one - other) == 1), (steps, t)
            halves += one != other
    assert halves, "if this is 0, the peer has been mended: compare for equality"


def test_linspace_times_are_the_peers_but_for_its_rounding_of_halves_and_one_step() -> None:
    """round(linspace(0, T - 1, n)). The one time of one step is 0 for the peer: it would take pure noise for an image
    that is nearly clean. Ours is T - 1, where the noise belongs.
    """
    schedule = make_schedule("linear")
    assert (schedule.times(1, "linspace"), peers_times("linspace", 1)) == ([999.0], [0])
    for steps in MANY[1:]:
        exact = [999 - Fraction(999 * i, steps - 1) for i in range(steps)]
        ours = schedule.times(steps, "linspace")
        for t, one, other in zip(exact, ours, peers_times("linspace", steps), strict=True):
            assert one == other or (t.denominator == 2 and abs(one - other) == 1), (steps, t)
            assert abs(one - t) <= Fraction(1, 2), (steps, t)


def test_leading_times_are_the_peers_where_the_steps_divide_and_cover_the_range_where_not() -> None:
    """floor(c * i) with c = T / n (Song, Meng & Ermon 2020, appendix D.2, "linear"). The peer takes floor(T / n) for c,
    and so leaves the noisiest timesteps out: a third of them with 667 steps of 1000. Ours never leaves out more than
    it does between two steps.
    """
    schedule = make_schedule("linear")
    for steps in MANY:
        ours, theirs = schedule.times(steps, "leading"), peers_times("leading", steps)
        assert ours == [i * 1000 // steps for i in reversed(range(steps))]
        assert theirs == [i * (1000 // steps) for i in reversed(range(steps))]
        assert (ours == theirs) == (1000 % steps <= 1)
        assert 1000 - ours[0] <= -(-1000 // steps)
    assert peers_times("leading", 667)[0] == 666


def network(x_t: Tensor, t: Tensor, /) -> Tensor:
    """Any function will do, as long as it is not linear and depends on everything."""
    return torch.tanh(1.7 * x_t + 0.3 * x_t.roll(1, dims=-1)) + torch.sin(t.double() / 50.0)[:, None, None, None] * 0.4


def start(n: int = 3) -> Tensor:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class GeneratorNoise:
    """The noise that diffusers draws from a torch generator, in its order."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(7), dtype

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
        return torch.randn(3, *shape, generator=self.generator, dtype=self.dtype).to(dtype)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [1, 7, 10, 13, 333])
def test_ddpm_at_the_peers_own_times(spacing: str, variance: str, steps: int) -> None:
    """It draws noise at every step but those from timestep 0. Where its times do not end there, it draws in the last
    step too, against algorithm 2 of Ho et al.: there ours is its mean.
    """
    schedule = make_schedule("linear")
    assert isinstance(schedule, DiscreteSchedule)
    scheduler = diffusers.DDPMScheduler(variance_type=variance, timestep_spacing=spacing, clip_sample=False)
    scheduler.alphas_cumprod, scheduler.one = schedule.alphas_cumprod, torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x, states, generator = start(), [], torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3)), t, x, generator=generator).prev_sample
        states.append(x)
    denoiser, got = Denoiser(GaussianProcess(schedule), network), []
    times = [float(t) for t in scheduler.timesteps]
    sampler = make_sampler("ddpm", schedule, steps, times=times, variance=variance)
    sampler.sample(denoiser, start(), GeneratorNoise(), lambda step: got.append(step.x_s))
    same = steps if times[-1] == 0 else steps - 1
    for one, other in zip(got[:same], states[:same], strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    if same < steps and variance == "fixed_large":
        assert not torch.allclose(got[-1], states[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_ddim_from_zero_terminal_snr(prediction: str, eta: float, steps: int) -> None:
    """From alpha = 0 on, with steps that divide T: for others it takes the timestep before as t - T // n."""
    schedule = make_schedule("linear", rescale_zero_terminal_snr=True)
    assert isinstance(schedule, DiscreteSchedule)
    names = {"v": "v_prediction", "x0": "sample"}
    scheduler = diffusers.DDIMScheduler(
        prediction_type=names[prediction], clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        schedule.alphas_cumprod,
        torch.ones((), dtype=torch.float64),
    )
    scheduler.set_timesteps(steps)
    assert [float(t) for t in scheduler.timesteps] == schedule.times(steps)
    x, generator = start(), torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3)), t, x, eta=eta, generator=generator).prev_sample
    denoiser = Denoiser(GaussianProcess(schedule, prediction), network)
    got = make_sampler("ddim", schedule, steps, eta=eta).sample(denoiser, start(), GeneratorNoise())
    torch.testing.assert_close(got, x, **EXACT)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding(quantile: float) -> None:
    """The quantile is found in float32, where float64 is the peer's; so is that of its half-precision images."""
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=float("inf")
    )
    x0 = torch.stack([scale * start(1)[0] for scale in (0.1, 1.0, 3.0)])
    torch.testing.assert_close(dynamic_threshold(x0, quantile), scheduler._threshold_sample(x0), rtol=1e-6, atol=1e-7)
    narrow = x0.float()
    torch.testing.assert_close(dynamic_threshold(narrow, quantile), scheduler._threshold_sample(narrow))


@pytest.mark.parametrize("snr", [0.1, 0.16])
def test_the_langevin_corrector(snr: float) -> None:
    """Of one image: over several the peer takes means of the norms, so that images would depend on their batch.

    Its predictor is reverse diffusion (Song et al. 2021, appendix E), not ancestral sampling, and is not compared.
    """
    scheduler = diffusers.ScoreSdeVeScheduler(snr=snr)
    scheduler.set_timesteps(10)
    schedule, x, sigma = make_schedule("ve"), 3.0 * start(1), float(make_schedule("ve").sigma(0.4))

    def denoiser(x: Tensor, t: float) -> Tensor:
        return torch.tanh(0.3 * x)

    score, z = (denoiser(x, 0.4) - x) / sigma**2, torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    theirs = scheduler.step_correct(score, x, generator=torch.Generator().manual_seed(7)).prev_sample

    class Given:
        def normal(self, *args: object, **options: object) -> Tensor:
            return z.double()

    sampler = PredictorCorrectorSampler(schedule, 2, times=[0.8, 0.4], corrector_snr=snr)
    corrected = sampler._corrected(Move(1, 3, (0.4, 0.2), x, denoiser, Given()))
    torch.testing.assert_close(corrected, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("levels", [10, 13, 100])
def test_noise_levels_of_the_exploding_sde(levels: int) -> None:
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=1348.0)
    scheduler.set_sigmas(levels)
    t = torch.linspace(0, 1, levels, dtype=torch.float64)[1:]
    ours = make_schedule("ve", sigma_min=0.01, sigma_max=1348.0).sigma(t)
    torch.testing.assert_close(ours, scheduler.discrete_sigmas[1:].double(), rtol=1e-5, atol=0)


def test_flow_matching_has_the_peers_path() -> None:
    """x_t = sigma * noise + (1 - sigma) * x0, at the peer's own noise levels."""
    scheduler, x0, noise = diffusers.FlowMatchEulerDiscreteScheduler(), start(), start().flip(0)
    for index in (0, 499, 999):
        t = scheduler.timesteps[index : index + 1]
        theirs = scheduler.scale_noise(x0, t.expand(3), noise)
        ours = GaussianProcess(make_schedule("flow"), "flow").q_sample(x0, float(scheduler.sigmas[index]), noise)
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.4)])
def test_logit_normal_times(mean: float, std: float) -> None:
    """Esser et al. 2024, section 3.1: the same normal variates make the same times."""
    training_utils = pytest.importorskip("diffusers.training_utils")
    theirs = training_utils.compute_density_for_timestep_sampling(
        "logit_normal", 500, mean, std, generator=torch.Generator().manual_seed(3)
    )
    z = torch.normal(mean, std, (500,), generator=torch.Generator().manual_seed(3)).double()
    process = ProcessConfig.model_validate({"schedule": "flow", "prediction": "flow"})
    objective = ObjectiveConfig.model_validate({"times": "logit_normal", "time_mean": mean, "time_std": std})
    ours = training_times(process, objective)(torch.special.ndtr((z - mean) / std))
    np.testing.assert_allclose(ours.numpy(), theirs.clamp(min=1e-3).numpy(), rtol=1e-5)


@pytest.mark.parametrize(("prediction", "plus"), [("epsilon", 0), ("v", 1)])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_min_snr_weights(kind: str, prediction: str, plus: int) -> None:
    """min(SNR, 5) / SNR for the noise and / (SNR + 1) for v, as its training scripts have it, with the peer's SNR."""
    training_utils = pytest.importorskip("diffusers.training_utils")
    schedule, t = make_schedule(kind), torch.arange(1000)
    assert isinstance(schedule, DiscreteSchedule)
    scheduler = diffusers.DDPMScheduler()
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    snr = training_utils.compute_snr(scheduler, t).double()
    torch.testing.assert_close(torch.exp(schedule.log_snr(t)), snr, rtol=1e-5, atol=0)
    objective = Objective(
        GaussianProcess(schedule, prediction), ObjectiveConfig.model_validate({"weighting": "min_snr"})
    )
    torch.testing.assert_close(objective.weight(t), snr.clamp(max=5.0) / (snr + plus), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance(scale: float, rescale: float) -> None:
    """Away from a weaker model; the peer's original formulation is eq. 6 of Ho & Salimans 2022: their w is s - 1."""
    guiders = pytest.importorskip("diffusers.guiders")
    x_t, t, label = start(), 400, torch.tensor([0, 1, 1])

    def better(x: Tensor, t: Tensor, /, label: Tensor) -> Tensor:
        return torch.tanh(x + label[:, None, None, None])

    def weaker(x: Tensor, t: Tensor, /) -> Tensor:
        return 0.6 * torch.tanh(x)

    process = GaussianProcess(make_schedule("cosine"), "x0")
    guidance = GuidanceConfig(scale=scale, rescale=rescale)
    ours = Denoiser(process, better, {"label": label}, guidance, guide=weaker)(x_t, t)
    outputs = better(x_t, torch.tensor(t), label), weaker(x_t, torch.tensor(t))
    plain = guiders.ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
    original = guiders.ClassifierFreeGuidance(
        guidance_scale=scale - 1.0, guidance_rescale=rescale, use_original_formulation=True
    )
    for guider in (plain, original):
        torch.testing.assert_close(ours, guider.forward(*outputs).pred, **EXACT)
