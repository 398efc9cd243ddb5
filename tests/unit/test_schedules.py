"""Schedules: published values, real times, spacings, and what must hold for every one of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.config import UserError
from diffusion_core.diffusion import DiscreteSchedule, ScheduleKind, Spacing, make_schedule

KINDS = [kind.value for kind in ScheduleKind if kind.is_discrete]
quick = settings(max_examples=40, deadline=None)


def discrete(kind: str, timesteps: int = 1000) -> DiscreteSchedule:
    schedule = make_schedule(kind, timesteps)
    assert isinstance(schedule, DiscreteSchedule)
    return schedule


def test_cosine_has_its_published_end() -> None:
    schedule = discrete("cosine")
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(2.43e-9, rel=1e-3)
    assert int((schedule.betas == 0.999).sum()) == 1


def test_cosine_follows_the_formula_of_the_paper() -> None:
    def signal(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [signal(t + 1) / signal(0) for t in range(999)]
    np.testing.assert_allclose(discrete("cosine").alphas_cumprod[:-1], expected, rtol=1e-9)


def test_linear_has_its_published_end_and_posterior_variance() -> None:
    schedule = discrete("linear")
    assert float(schedule.alphas_cumprod[999]) == pytest.approx(4.0358298e-5, rel=1e-7)
    assert float(schedule.transition(0, 1).posterior_variance) == pytest.approx(5.4531877e-5, rel=1e-7)


@pytest.mark.parametrize("timesteps", [50, 100, 250, 4000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_timesteps_ends_in_noise(kind: str, timesteps: int) -> None:
    """An unscaled linear schedule would end at 0.36 for T = 100; that of latent diffusion ends at 0.0047."""
    limit = 5e-3 if kind == "scaled_linear" else 1e-3
    assert float(discrete(kind, timesteps).alphas_cumprod[-1]) < limit


@pytest.mark.parametrize(
    ("kind", "name"), [("linear", "linear"), ("quadratic", "scaled_linear"), ("sigmoid", "sigmoid")]
)
def test_betas_agree_with_diffusers(kind: str, name: str) -> None:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name, beta_start=1e-4, beta_end=0.02)
    np.testing.assert_allclose(discrete(kind).betas, peer.betas.double(), rtol=1e-5)


def test_latent_diffusion_betas_agree_with_diffusers() -> None:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(discrete("scaled_linear").betas, peer.betas.double(), rtol=1e-5)


def test_cosine_betas_agree_with_diffusers() -> None:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(num_train_timesteps=400, beta_schedule="squaredcos_cap_v2")
    np.testing.assert_allclose(discrete("cosine", 400).betas, peer.betas.double(), rtol=1e-4, atol=1e-7)


def test_beta_bounds_are_options() -> None:
    schedule = make_schedule("linear", beta_start=1e-3, beta_end=0.01)
    assert isinstance(schedule, DiscreteSchedule)
    assert float(schedule.betas[0]) == pytest.approx(1e-3)
    assert float(schedule.betas[-1]) == pytest.approx(0.01)


@quick
@given(kind=st.sampled_from(KINDS), timesteps=st.integers(2, 2000))
def test_tables_are_float64_monotone_and_in_range(kind: str, timesteps: int) -> None:
    schedule = discrete(kind, timesteps)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.betas.shape == schedule.alphas_cumprod.shape == (timesteps,)
    assert bool((schedule.alphas_cumprod.diff() < 0).all())
    assert 0 < float(schedule.alphas_cumprod[-1]) < float(schedule.alphas_cumprod[0]) < 1
    t = torch.arange(timesteps)
    assert bool((schedule.log_snr(t).diff() < 0).all())
    torch.testing.assert_close(schedule.alpha(t).square(), schedule.alphas_cumprod, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.sigma(t).square(), 1 - schedule.alphas_cumprod, rtol=1e-10, atol=1e-15)


@quick
@given(kind=st.sampled_from(KINDS), timesteps=st.integers(2, 300), place=st.floats(0, 1))
def test_real_times_preserve_variance_and_lie_between_their_neighbours(kind: str, timesteps: int, place: float) -> None:
    schedule = discrete(kind, timesteps)
    t = -1 + place * timesteps
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
    below, above = math.floor(t), min(math.ceil(t), timesteps - 1)
    assert float(schedule.alpha(above)) <= alpha <= float(schedule.alpha(below))
    if t > -0.999:
        assert float(schedule.log_snr(t)) == pytest.approx(2 * math.log(alpha / sigma), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_image_is_at_t_clean(kind: str) -> None:
    schedule = make_schedule(kind)
    assert float(schedule.alpha(schedule.t_clean)) == 1.0
    assert float(schedule.sigma(schedule.t_clean)) == 0.0
    assert float(schedule.log_snr(schedule.t_clean)) == math.inf


def test_shapes_and_kinds_of_times() -> None:
    schedule = make_schedule("linear")
    assert schedule.alpha(3).shape == ()
    assert schedule.alpha(torch.tensor([[3, 4]])).shape == (1, 2)
    for t in (7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)):
        assert schedule.sigma(t).dtype == torch.float64
        assert float(schedule.sigma(t)) == float(schedule.sigma(7))


@pytest.mark.parametrize("t", [-1.5, 1000, math.nan])
def test_a_time_outside_is_an_error(t: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        make_schedule("linear").alpha(t)


def test_the_first_timesteps_are_noisy_even_where_half_precision_would_round_them_away() -> None:
    """In bfloat16 alphas_cumprod of timesteps 0 to 9 (linear) is exactly 1."""
    schedule = discrete("linear")
    assert bool((schedule.alphas_cumprod[:10].bfloat16() == 1).all())
    assert bool((schedule.sigma(torch.arange(10)) >= 0.0099).all())


@quick
@given(kind=st.sampled_from(KINDS), timesteps=st.integers(2, 500), data=st.data())
def test_transition_agrees_with_the_formulas_in_alphas_cumprod(kind: str, timesteps: int, data: st.DataObject) -> None:
    """Ho et al. 2020, eq. 6 and 7, with the respaced beta in place of beta."""
    schedule = discrete(kind, timesteps)
    t = data.draw(st.integers(0, timesteps - 1))
    s = data.draw(st.integers(-1, t - 1))
    bar_t = float(schedule.alphas_cumprod[t])
    bar_s = float(schedule.alphas_cumprod[s]) if s >= 0 else 1.0
    beta = 1 - bar_t / bar_s
    step = schedule.transition(s, t)
    expected = {
        "x_t_coefficient": math.sqrt(bar_t / bar_s) * (1 - bar_s) / (1 - bar_t),
        "x0_coefficient": math.sqrt(bar_s) * beta / (1 - bar_t),
        "posterior_variance": beta * (1 - bar_s) / (1 - bar_t),
        "forward_variance": beta,
    }
    for name, value in expected.items():
        assert float(getattr(step, name)) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_spacings_by_hand() -> None:
    schedule = discrete("linear", 10)
    assert schedule.times(5) == [9, 7, 5, 3, 1]
    assert schedule.times(5, Spacing.LEADING) == [8, 6, 4, 2, 0]
    assert schedule.times(4, Spacing.LINSPACE) == [9, 6, 3, 0]
    assert schedule.times(3) == [9, 6, 2]  # 3 does not divide 10
    assert schedule.times(1) == [9]


@quick
@given(timesteps=st.integers(2, 1200), data=st.data(), spacing=st.sampled_from(list(Spacing)))
def test_times_are_distinct_descending_timesteps(timesteps: int, data: st.DataObject, spacing: Spacing) -> None:
    steps = data.draw(st.integers(1, timesteps))
    times = discrete("cosine", timesteps).times(steps, spacing)
    assert len(times) == steps
    assert all(later < earlier for earlier, later in pairwise(times))
    assert times[0] <= timesteps - 1
    assert times[-1] >= 0
    if spacing is not Spacing.LEADING:
        assert times[0] == timesteps - 1
    if spacing is Spacing.KARRAS:  # real times
        return
    assert all(t == int(t) for t in times)
    if steps == timesteps:
        assert times == list(range(timesteps - 1, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=r"steps: .* from 1 to 1000"):
        make_schedule("linear").times(steps)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"'cubic'.*linear, scaled_linear, cosine, quadratic, sigmoid, vp, ve, edm, flow"
    ):
        make_schedule("cubic")
    with pytest.raises(UserError, match="at least 2"):
        make_schedule("linear", 1)
    with pytest.raises(UserError, match="spacing"):
        make_schedule("linear").times(5, "uneven")  # type: ignore[arg-type]


@pytest.mark.parametrize("betas", [[1.0, 0.1], [0.1, 1.1], [0.0, 0.1], [[0.1]], [math.nan]])
def test_impossible_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        DiscreteSchedule(np.array(betas))
