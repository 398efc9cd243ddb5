"""Every sampler against a plain reference on numbers, written from its paper; and what holds for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion import KeyedNoise, NoiseSchedule, ScheduleKind, Spacing, make_sampler, make_schedule
from diffusion_core.diffusion.samplers import Move, Step
from tests.oracles import BIMODAL, EVERY_SAMPLER, ExactDenoiser
from tests.references import Fixed, dpm_solver, edm_algorithm_2, model, predictor_corrector, unipc

CLOSE = 1e-10


def on_tensors(x: Tensor, t: float) -> Tensor:
    return x.clone().apply_(lambda value: model(value, t))


def compare(
    kind: str,
    reference: Callable[..., float],
    schedule: NoiseSchedule,
    steps: int,
    **options: Any,
) -> None:
    """A sampler on one number, and the reference on the same; steps of both kinds of length."""
    sampler = make_sampler(kind, schedule, steps, **options)
    got = float(sampler.sample(on_tensors, torch.full((1, 1), 0.7, dtype=torch.float64), Fixed()))
    levels = [(float(schedule.alpha(t)), float(schedule.sigma(t)), t) for t in sampler.times]
    expected = reference(0.7 * schedule.prior_scale(sampler.times[0]), levels, Fixed())
    assert got == pytest.approx(expected, abs=CLOSE, rel=CLOSE)


SCHEDULES = ["linear", "cosine", "edm", "vp"]
STEPS = [2, 7, 13, 20]  # few and many; 7 and 13 do not divide 1000


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("kind", "order", "sde"),
    [("dpmpp_2m", 2, False), ("dpmpp_2m_sde", 2, True), ("dpmpp_3m", 3, False), ("dpmpp_3m_sde", 3, True)],
)
def test_dpm_solver(kind: str, order: int, sde: bool, schedule: str, steps: int) -> None:
    compare(kind, dpm_solver(order, sde), make_schedule(schedule), steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, schedule: str, steps: int) -> None:
    compare("unipc", unipc(order), make_schedule(schedule), steps, order=order)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["euler", "heun"])
@pytest.mark.parametrize("churn", [(0.0, 0.0, math.inf, 1.0), (3.0, 0.05, 50.0, 1.003), (40.0, 0.0, 10.0, 1.0)])
@pytest.mark.parametrize("spacing", ["karras", "trailing"])
def test_edm_sampler(kind: str, churn: tuple[float, float, float, float], spacing: str, steps: int) -> None:
    amount, low, high, noise = churn
    options = {"churn": amount, "churn_min": low, "churn_max": None if high == math.inf else high, "churn_noise": noise}
    reference = edm_algorithm_2(kind == "heun", *churn)
    compare(kind, reference, make_schedule("edm"), steps, spacing=spacing, **options)


@pytest.mark.parametrize("schedule", [*SCHEDULES, "ve"])
@pytest.mark.parametrize("steps", STEPS)
def test_predictor_corrector(schedule: str, steps: int) -> None:
    reference = predictor_corrector(0.1, 2)
    compare("predictor_corrector", reference, make_schedule(schedule), steps, corrector_snr=0.1, corrector_steps=2)


@pytest.mark.parametrize(("kind", "sde"), [("dpmpp_3m", False), ("dpmpp_3m_sde", True)])
def test_the_third_order_is_exact_for_quadratics_and_the_peers_is_not(kind: str, sde: bool) -> None:
    """An estimate that is quadratic in lambda, whatever x: the integral is known, so it is clear who is right.

    The authors' multistep code, diffusers and k-diffusion take half of the last term (the SDE of diffusers with a
    constant of the wrong sign), although the authors' own single-step solver has the factor 2.
    """
    schedule = make_schedule("vp")
    sampler = make_sampler(kind, schedule, 30)
    lam = [sampler.level(t).lam for t in sampler.times]

    def quadratic(x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, 0.3 * sampler.level(t).lam ** 2)

    x = torch.full((1, 1), 0.7, dtype=torch.float64)
    moves = [Move(i, 30, sampler.intervals[i], x, quadratic) for i in (12, 11, 10)]
    move = Move(12, 30, sampler.intervals[12], x, quadratic, Zero(), moves[1:])
    h, (alpha, sigma, _), decay = lam[13] - lam[12], sampler.level(sampler.times[13]), 2.0 if sde else 1.0
    u, weight = np.polynomial.legendre.leggauss(40)
    u = 0.5 * h * (u + 1)
    mean = np.sum(0.5 * h * weight * decay * np.exp(-decay * (h - u)) * 0.3 * (lam[12] + u) ** 2)
    kept = sigma / sampler.level(sampler.times[12]).sigma * (math.exp(-h) if sde else 1.0)
    assert float(sampler.step(move)) == pytest.approx(kept * 0.7 + alpha * float(mean), abs=1e-12)


class Zero:
    def normal(self, shape, step, draw=0, device=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
        return torch.zeros(1, *shape, dtype=dtype)


# What holds for all samplers and schedules.


class Watched(KeyedNoise):
    """Writes down every draw, in the list in which a denoiser writes its calls."""

    def __init__(self, ids: list[int], events: list[str]) -> None:
        super().__init__(0, ids)
        self.events = events

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float32):  # type: ignore[no-untyped-def]
        self.events.append("draw")
        return super().normal(shape, step, draw, device, dtype)


@pytest.mark.parametrize("schedule", [kind.value for kind in ScheduleKind])
@pytest.mark.parametrize(("kind", "options"), EVERY_SAMPLER)
def test_evaluations_are_as_announced_and_no_noise_is_on_the_result(
    kind: str, options: dict[str, Any], schedule: str
) -> None:
    """The result is the estimate that was asked for last, and nothing was drawn after it."""
    noise = make_schedule(schedule)
    for steps in (1, 2, 3, 16):
        sampler, exact, events = make_sampler(kind, noise, steps, **options), ExactDenoiser(noise, BIMODAL), []
        estimates: list[Tensor] = []

        def denoiser(x: Tensor, t: float, exact=exact, events=events, estimates=estimates) -> Tensor:  # type: ignore[no-untyped-def]
            events.append("ask")
            estimates.append(exact(x, t))
            return estimates[-1]

        source = Watched([0, 1, 2], events)
        seen = list(sampler.trajectory(denoiser, source.initial((2, 2), dtype=torch.float64), source))
        assert exact.calls == sampler.evaluations, steps
        assert len(seen) == steps
        assert torch.isfinite(torch.stack([step.x_s for step in seen])).all(), steps
        assert events[-1] == "ask", (steps, events)
        for last in (seen[-1].x0_hat, estimates[-1]):
            torch.testing.assert_close(seen[-1].x_s, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), EVERY_SAMPLER)
def test_callbacks_and_trajectories_show_every_step(kind: str, options: dict[str, Any]) -> None:
    schedule, source = make_schedule("cosine"), KeyedNoise(0, [4, 7])
    sampler, x_T = make_sampler(kind, schedule, 9, **options), source.initial((1, 2, 2))
    shown: list[Step] = []
    x = sampler.sample(ExactDenoiser(schedule), x_T, source, shown.append)
    assert [(step.index, step.steps) for step in shown] == [(index, 9) for index in range(9)]
    assert [(step.t, step.s) for step in shown] == sampler.intervals
    assert torch.equal(shown[-1].x_s, x)
    denoiser = ExactDenoiser(schedule)
    states = sampler.trajectory(denoiser, x_T, source)
    first = next(states)
    assert denoiser.calls <= 2, "a step is computed when it is asked for"
    for step, again in zip(shown, [first, *states], strict=True):  # and no later step changes what was shown
        assert torch.equal(step.x_s, again.x_s) and torch.equal(step.x0_hat, again.x0_hat)
        assert step.x_s.shape == step.x0_hat.shape == x_T.shape
    assert torch.equal(sampler.sample(ExactDenoiser(schedule), x_T, source), x), "with or without a callback"


@pytest.mark.parametrize(("kind", "options"), EVERY_SAMPLER)
@settings(max_examples=8, deadline=None)
@given(
    schedule=st.sampled_from(list(ScheduleKind)),
    steps=st.integers(1, 20),
    spacing=st.sampled_from(list(Spacing)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    cut=st.integers(1, 5),
    timesteps=st.integers(20, 200),
)
def test_any_sampler_on_any_schedule_is_finite_and_does_not_see_its_batch(
    kind: str,
    options: dict[str, Any],
    schedule: ScheduleKind,
    steps: int,
    spacing: Spacing,
    dtype: torch.dtype,
    cut: int,
    timesteps: int,
) -> None:
    noise, ids = make_schedule(schedule, timesteps), torch.tensor([5, 900, 2, 31, 2**40, 77])
    if noise.ends_in_pure_noise and spacing is Spacing.KARRAS:
        spacing = Spacing.TRAILING
    sampler = make_sampler(kind, noise, steps, spacing=spacing, **options)

    def images(ids: Tensor) -> Tensor:
        source = KeyedNoise(3, ids)
        return sampler.sample(ExactDenoiser(noise), source.initial((1, 3, 3), dtype=dtype), source)

    whole = images(ids)
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    assert whole.shape == (6, 1, 3, 3)
    assert bool(torch.isfinite(whole).all())
    assert torch.equal(whole, torch.cat((images(ids[:cut]), images(ids[cut:]))))
    assert torch.equal(images(ids.flip(0)), whole.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "options"), EVERY_SAMPLER)
def test_the_state_is_float32_also_from_half_precision_noise(
    kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """In bfloat16 the noise of the last steps would be rounded away, and every step would add its rounding."""
    schedule, source = make_schedule("cosine"), KeyedNoise(0, [0, 1])
    sampler, half = make_sampler(kind, schedule, 12, **options), source.initial((1, 3, 3), dtype=dtype)
    x = sampler.sample(ExactDenoiser(schedule), half, source)
    assert x.dtype == torch.float32
    assert torch.equal(x, sampler.sample(ExactDenoiser(schedule), half.float(), source))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm", "flow"])
@pytest.mark.parametrize(("kind", "options"), EVERY_SAMPLER)
def test_float32_is_as_good_as_float64(kind: str, options: dict[str, Any], schedule: str) -> None:
    """Nothing cancels on the way, from pure noise to the clean image: less than a tenth of a pixel value is lost."""
    noise, source = make_schedule(schedule), KeyedNoise(0, torch.arange(4))
    for steps in (1, 2, 30):
        sampler = make_sampler(kind, noise, steps, **options)
        narrow, wide = (
            sampler.sample(ExactDenoiser(noise, BIMODAL), source.initial((1, 4, 4), dtype=dtype), source)
            for dtype in (torch.float32, torch.float64)
        )
        torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=5e-4)


@pytest.mark.parametrize("kind", ["ddim", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc"])
def test_deterministic_samplers_need_no_noise(kind: str) -> None:
    schedule = make_schedule("cosine")
    make_sampler(kind, schedule, 6).sample(ExactDenoiser(schedule), torch.ones(1, 1))


@pytest.mark.parametrize("kind", ["ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde", "predictor_corrector"])
def test_samplers_with_noise_ask_for_it(kind: str) -> None:
    schedule = make_schedule("cosine")
    with pytest.raises(ValueError, match="KeyedNoise"):
        make_sampler(kind, schedule, 6).sample(ExactDenoiser(schedule), torch.ones(1, 1))


@pytest.mark.parametrize("kind", ["dpmpp_3m", "unipc"])
def test_a_sampler_keeps_no_more_of_the_past_than_it_needs(kind: str) -> None:
    schedule, alive = make_schedule("cosine"), 0

    class Counted(ExactDenoiser):
        def __call__(self, x_t: Tensor, t: float) -> Tensor:
            out = super().__call__(x_t, t)
            nonlocal alive
            alive += 1
            import weakref

            weakref.finalize(out, released)
            return out

    def released() -> None:
        nonlocal alive
        alive -= 1

    most = 0
    for _ in make_sampler(kind, schedule, 30).trajectory(Counted(schedule), torch.ones(1, 1)):
        most = max(most, alive)
    assert most <= 5


def test_churn_stays_within_what_the_network_was_trained_at() -> None:
    schedule = make_schedule("linear")
    asked: list[float] = []

    def denoiser(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    source = KeyedNoise(0, [0])
    make_sampler("euler", schedule, 10, churn=5.0).sample(denoiser, torch.ones(1, 1), source)
    assert asked[0] == 999.0
    times = schedule.times(10)
    assert all(t < raised <= 999.0 for t, raised in zip(times[1:], asked[1:], strict=True))
    ratio = [float(torch.exp(-0.5 * schedule.log_snr(t))) for t in (times[5], asked[5])]
    assert ratio[1] == pytest.approx(ratio[0] * math.sqrt(2))  # the most that a step may add


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("unipc", {"order": 4}, "order: 4 is not accepted"),
        ("euler", {"churn": -1.0}, "churn: -1.0 is not accepted"),
        ("predictor_corrector", {"corrector_steps": 0}, "corrector_steps: 0"),
        ("ddim", {"spacing": "karras", "rho": 0.5}, "rho: 0.5"),
    ],
)
def test_impossible_options_are_refused(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_sampler(kind, make_schedule("linear"), 5, **options)
