"""Samplers against exact denoisers: orders of convergence on the probability-flow ODE, and exact moments of the noise.

Orders are measured on grids that are even in log-SNR, up to a little noise: the step from there to the clean image is
the denoiser's estimate for all samplers, so that its error would hide theirs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion import KeyedNoise, NoiseSchedule, SamplerKind, make_sampler, make_schedule
from diffusion_core.diffusion.samplers import DDIMSampler, Move, Sampler, predictor_corrector
from tests.oracles import BIMODAL, EVERY_SAMPLER, GAUSSIAN, ExactDenoiser, Mixture, even_log_snr, slopes

DOUBLINGS = (40, 80, 160, 320)
ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {}, 2),  # the first step is of first order, whose error of second order stays
    ("unipc", {"order": 1}, 2),  # the corrector adds one
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 3}, 3),  # its first step is of second order
]
WEAK_ORDERS = [  # of moments
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "fixed_large"}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("euler", {"churn": 5.0}, 1),
    ("heun", {"churn": 5.0}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_3m_sde", {}, 2),
    ("predictor_corrector", {"corrector_snr": 0.5}, 1),  # over the root of the number of steps, see below
    ("predictor_corrector", {"corrector_snr": 2.0}, 1),
]


def test_every_sampler_has_an_order_that_is_shown() -> None:
    assert {kind for kind, _, _ in (*ORDERS, *WEAK_ORDERS)} == set(SamplerKind)


def sampler_on(kind: str, schedule: NoiseSchedule, steps: int, first: float, last: float, **options: Any) -> Sampler:
    times = even_log_snr(schedule, steps, first, last)
    return make_sampler(kind, schedule, steps + 1, times=times, **options)


def start(n: int = 40) -> Tensor:
    return KeyedNoise(0, torch.arange(n)).initial((1,), dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "edm"])
@pytest.mark.parametrize("data", [GAUSSIAN, BIMODAL])
@pytest.mark.parametrize(("kind", "options", "order"), ORDERS)
def test_deterministic_samplers_converge_at_their_order(
    kind: str, options: dict[str, Any], order: int, schedule: str, data: Mixture
) -> None:
    noise = make_schedule(schedule)
    denoiser, errors = ExactDenoiser(noise, data), []
    for steps in DOUBLINGS:
        sampler = sampler_on(kind, noise, steps, 0.0, 6.0, **options)
        *_, before_last, _ = sampler.trajectory(denoiser, start())
        x = noise.prior_scale(sampler.times[0]) * start()
        exact = denoiser.flow(x, sampler.times[0], sampler.times[-1])
        errors.append(float((before_last.x_s - exact).abs().max()))
    assert all(abs(slope - order) < 0.25 for slope in slopes(errors)), (errors, slopes(errors))


@pytest.mark.parametrize("data", [GAUSSIAN, BIMODAL])
def test_3m_is_of_third_order_once_it_has_started(data: Mixture) -> None:
    """With exact first moves. With half of the last term, as in the peer's, it would be 2."""
    schedule, errors = make_schedule("edm"), []
    denoiser = ExactDenoiser(schedule, data)
    for steps in DOUBLINGS:
        sampler = sampler_on("dpmpp_3m", schedule, steps, 0.0, 6.0)
        x_t = first = sampler.times[0] * start()
        past: list[Move] = []
        for index, (t, s) in enumerate(sampler.intervals[:-1]):
            if index < 3:
                x_t = denoiser.flow(first, sampler.times[0], t)
            move = Move(index, steps + 1, (t, s), x_t, denoiser, past=past[:2])
            x_t = sampler.step(move)
            past.insert(0, move)
        errors.append(float((x_t - denoiser.flow(first, sampler.times[0], sampler.times[-1])).abs().max()))
    assert all(abs(slope - 3) < 0.25 for slope in slopes(errors)), (errors, slopes(errors))


class UnitDraws:
    """Each draw is 1 in one image of the batch and 0 in all others."""

    def __init__(self, images: int) -> None:
        self.images, self.used = images, 2

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
        z = torch.zeros(self.images, *shape, dtype=dtype)
        z[self.used] = 1.0
        self.used += 1
        return z


def exact_moments(sampler: Sampler, denoiser: ExactDenoiser) -> tuple[float, float]:
    """Mean and variance before the last step, without any chance.

    For Gaussian data every step is affine in x_T and in its noise: image 0 is without noise, image 1 has a unit x_T,
    and each further one a unit draw; the squares of what they add up to are the variance.
    """
    mean, variance, _ = denoiser.data.marginal(*denoiser.at(sampler.times[0]))
    draws = sampler.evaluations  # a sampler draws no oftener than it asks
    x = torch.full((2 + draws, 1), float(mean), dtype=torch.float64)
    x[1] += float(variance.sqrt())
    scale = sampler.schedule.prior_scale(sampler.times[0])
    *_, before_last, _ = sampler.trajectory(denoiser, x / scale, UnitDraws(len(x)))
    return float(before_last.x_s[0]), float((before_last.x_s - before_last.x_s[0]).square().sum())


def expected_norm(x: Tensor) -> Tensor:
    """The root of the mean square of what the images of `exact_moments` stand for."""
    return (x[:1].square() + (x - x[:1]).square().sum(dim=0, keepdim=True)).sqrt()


@pytest.mark.parametrize("schedule", ["cosine", "flow", "edm"])
@pytest.mark.parametrize(("kind", "options", "order"), WEAK_ORDERS)
def test_the_moments_of_samplers_with_noise_converge_at_their_weak_order(
    kind: str, options: dict[str, Any], order: int, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Langevin correction of a ratio r leaves a variance that is 1 / (1 - r**2) too large, however many steps there
    are: so r**2 falls with the steps. Its norms are those of images of infinitely many elements. The predictor's
    variance is too small and the correctors' too large; at r**2 = 1 / steps they would nearly cancel.
    """
    noise = make_schedule(schedule)
    monkeypatch.setattr(predictor_corrector, "_norm", expected_norm)
    denoiser, errors = ExactDenoiser(noise), []
    for steps in DOUBLINGS:
        fitting = {name: value / steps**0.5 if name == "corrector_snr" else value for name, value in options.items()}
        sampler = sampler_on(kind, noise, steps, -2.0, 6.0, **fitting)
        mean, variance = exact_moments(sampler, denoiser)
        true_mean, true_variance, _ = denoiser.data.marginal(*denoiser.at(sampler.times[-1]))
        assert mean == pytest.approx(float(true_mean), abs=1e-12)
        errors.append(abs(variance - float(true_variance)))
    assert all(abs(slope - order) < 0.25 for slope in slopes(errors)), (errors, slopes(errors))


@pytest.mark.parametrize(("kind", "options"), EVERY_SAMPLER)
def test_every_sampler_reaches_a_mixture(kind: str, options: dict[str, Any]) -> None:
    """Both modes with their weights, by the greatest distance of distribution functions (Kolmogorov)."""
    schedule, n = make_schedule("cosine"), 100
    noise = KeyedNoise(1, torch.arange(n))
    x = make_sampler(kind, schedule, 60, **options).sample(
        ExactDenoiser(schedule, BIMODAL), noise.initial((400,), dtype=torch.float64), noise
    )
    ordered = x.flatten().sort().values
    distance = (BIMODAL.cdf(ordered, 1.0, 0.0) - torch.arange(len(ordered)) / len(ordered)).abs().max()
    assert float(distance) < 0.015


def test_langevin_corrections_keep_the_distribution() -> None:
    """At one time only: a marginal that is too narrow is widened, up to the bias 1 / (1 - r**2) of a finite step."""
    schedule = make_schedule("edm")
    sampler = make_sampler("predictor_corrector", schedule, 2, times=[2.0, 1.0], corrector_steps=40, corrector_snr=0.2)
    denoiser, n = ExactDenoiser(schedule), 60
    noise = KeyedNoise(2, torch.arange(n))
    move = Move(1, 3, (1.0, 0.5), 0.3 + 0.5 * noise.initial((500,), dtype=torch.float64), denoiser, noise)
    sampler.step(move)
    variance = 0.5**2 + 1.0
    assert float(move.x_t.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(move.x_t.var()) == pytest.approx(variance / (1 - 0.2**2), rel=0.03)


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in ORDERS}))
@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp", "ve", "edm", "flow"])
def test_deterministic_samplers_reach_the_data_from_start_to_end(kind: str, schedule: str) -> None:
    """From unit noise to clean images at the schedule's own times: quantiles of the noise become those of the data."""
    noise = make_schedule(schedule)
    spacing = "linspace" if schedule == "ve" else "trailing"
    p = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    x = make_sampler(kind, noise, 100, spacing=spacing).sample(
        ExactDenoiser(noise, BIMODAL), torch.special.ndtri(p)[:, None]
    )
    quantiles = BIMODAL.cdf(x[:, 0], 1.0, 0.0)
    torch.testing.assert_close(quantiles, p, rtol=0, atol=0.02)


@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
def test_euler_and_ddim_are_one(schedule: str) -> None:
    """Whatever variable the ODE is written in; DDIM at eta = 1 is then the ancestral Euler method of k-diffusion."""
    noise = make_schedule(schedule)
    denoiser = ExactDenoiser(noise, BIMODAL)
    euler, ddim = (make_sampler(kind, noise, 13).sample(denoiser, start()) for kind in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
def test_inversion_finds_the_noise(schedule: str) -> None:
    """First order with one evaluation a step; exact with several."""
    noise = make_schedule(schedule)
    denoiser = ExactDenoiser(noise, BIMODAL)
    x_T = 0.8 * start()
    errors = []
    for steps in (50, 100, 200):
        sampler = DDIMSampler(noise, steps)
        x0 = sampler.sample(denoiser, x_T)
        errors.append(float((sampler.sample(denoiser, sampler.invert(denoiser, x0)) - x0).abs().max()))
    assert all(0.6 < slope < 1.4 for slope in slopes(errors)), errors
    x0 = sampler.sample(denoiser, x_T)
    found = sampler.invert(denoiser, x0, iterations=30)
    torch.testing.assert_close(sampler.sample(denoiser, found), x0, rtol=0, atol=1e-6)


def test_an_inversion_with_noise_is_refused() -> None:
    with pytest.raises(UserError, match=r"eta: 0\.5 is not accepted for an inversion"):
        DDIMSampler(make_schedule("linear"), 5, eta=0.5).invert(lambda x, t: x, start())
