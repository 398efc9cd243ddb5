"""Schedules in continuous time and zero terminal SNR: the papers' formulas, inverses, spacings, and training times."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion import (
    DiscreteSchedule,
    GaussianProcess,
    NoiseSchedule,
    ScheduleKind,
    Spacing,
    keyed_uniform,
    make_schedule,
)

quick = settings(max_examples=60, deadline=None)
CONTINUOUS = [kind for kind in ScheduleKind if not kind.is_discrete]


def built(kind: ScheduleKind, timesteps: int, zero: bool) -> NoiseSchedule:
    return make_schedule(kind, timesteps, **({"rescale_zero_terminal_snr": True} if zero and kind.is_discrete else {}))


any_schedule = st.builds(
    built, kind=st.sampled_from(list(ScheduleKind)), timesteps=st.integers(2, 1500), zero=st.booleans()
)


def between(schedule: NoiseSchedule, share: float) -> float:
    return schedule.t_min + share * (schedule.t_max - schedule.t_min)


def test_vp_is_the_integral_of_beta() -> None:
    """Song et al. 2021, eq. 33: alpha = exp(-1/2 of the integral of beta), here by summing it up."""
    schedule, t = make_schedule("vp"), 0.37
    grid = torch.linspace(0, t, 200_001, dtype=torch.float64)
    integral = float(torch.trapezoid(0.1 + grid * 19.9, grid))
    assert float(schedule.alpha(t)) == pytest.approx(math.exp(-0.5 * integral), rel=1e-9)
    assert float(schedule.sigma(t)) == pytest.approx(math.sqrt(1 - math.exp(-integral)), rel=1e-9)


def test_vp_is_the_limit_of_the_linear_schedule() -> None:
    """T times the betas of Ho et al. are 0.1 to 20: beta(t) of the SDE (their appendix B)."""
    continuous, discrete = make_schedule("vp"), make_schedule("linear", 100_000)
    for t in (0.01, 0.2, 0.5, 0.99):
        assert float(continuous.alpha(t)) == pytest.approx(float(discrete.alpha(t * 100_000 - 1)), rel=1e-3)


def test_ve_grows_geometrically_and_is_clean_at_zero() -> None:
    schedule = make_schedule("ve", sigma_min=0.02, sigma_max=30.0)
    assert float(schedule.sigma(0.5)) == pytest.approx(math.sqrt(0.02 * 30.0))
    assert float(schedule.sigma(1.0)) == pytest.approx(30.0)
    assert float(schedule.sigma(0.0)) == 0.0
    assert float(schedule.alpha(0.7)) == 1.0
    assert schedule.prior_scale(1.0) == pytest.approx(30.0)


def test_edm_time_is_sigma() -> None:
    schedule = make_schedule("edm")
    assert float(schedule.sigma(3.5)) == 3.5
    assert float(schedule.alpha(3.5)) == 1.0
    assert schedule.network_time(3.5) == pytest.approx(math.log(3.5) / 4)
    assert float(schedule.network_scale(3.0)) == pytest.approx(1 / math.sqrt(10.0))  # type: ignore[arg-type]
    assert schedule.prior_scale(80.0) == 80.0


def test_edm_times_are_equation_5() -> None:
    steps, rho = 18, 7.0
    expected = [
        (80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(steps)
    ]
    for spacing in ("karras", "linspace"):
        assert make_schedule("edm").times(steps, spacing) == pytest.approx(expected, rel=1e-9)


def test_flow_matching_is_a_straight_line() -> None:
    schedule = make_schedule("flow")
    assert (float(schedule.alpha(0.3)), float(schedule.sigma(0.3))) == (0.7, 0.3)
    assert schedule.times(4) == [1.0, 0.75, 0.5, 0.25]
    assert schedule.ends_in_pure_noise
    assert schedule.network_time(0.25) == 250.0


def test_zero_terminal_snr_ends_in_noise_and_keeps_its_start() -> None:
    plain, zero = make_schedule("linear"), make_schedule("linear", rescale_zero_terminal_snr=True)
    assert isinstance(zero, DiscreteSchedule)
    assert float(zero.alphas_cumprod[-1]) == 0.0
    assert float(zero.alpha(999)) == 0.0
    assert float(zero.sigma(999)) == 1.0
    assert float(zero.log_snr(999)) == -math.inf
    assert float(zero.alpha(0)) == pytest.approx(float(plain.alpha(0)), rel=1e-12)
    # Between the last two timesteps the signal fades evenly; its logarithm could not.
    assert float(zero.alpha(998)) > 0.0
    assert float(zero.alpha(998.75)) == pytest.approx(0.25 * float(zero.alpha(998)), rel=1e-12)
    assert float(zero.time_of(zero.log_snr(998.75))) == pytest.approx(998.75, rel=1e-12)
    # Algorithm 1 of Lin et al. in one line: sqrt(alphas_cumprod) is shifted to end at 0 and scaled to start as before.
    first, last = float(plain.alpha(0)), float(plain.alpha(999))
    assert float(zero.alpha(500)) == pytest.approx((float(plain.alpha(500)) - last) * first / (first - last), rel=1e-9)


def test_zero_terminal_snr_is_refused_for_epsilon_and_learned_by_the_others() -> None:
    zero = make_schedule("linear", rescale_zero_terminal_snr=True)
    with pytest.raises(UserError, match="zero terminal SNR"):
        GaussianProcess(zero, "epsilon")
    x0, noise = torch.ones(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    for prediction in ("v", "x0", "flow", "edm"):
        process = GaussianProcess(zero, prediction)
        x_t = process.q_sample(x0, 999, noise)
        torch.testing.assert_close(process.predict_x0(x_t, 999, process.target(x0, 999, noise)), x0)
    x_s = zero.transition(500, 999)
    assert float(x_s.x_t_coefficient) == 0.0
    assert float(x_s.x0_coefficient) == pytest.approx(float(zero.alpha(500)))
    assert float(x_s.posterior_variance) == pytest.approx(float(zero.sigma(500)) ** 2)


@quick
@given(schedule=any_schedule, share=st.floats(0, 1))
def test_the_time_of_a_log_snr_is_its_inverse(schedule: NoiseSchedule, share: float) -> None:
    t = between(schedule, share)
    back = schedule.time_of(schedule.log_snr(t))
    assert float(back) == pytest.approx(t, abs=1e-6 * schedule.t_max + 1e-12, rel=1e-6)
    assert float(schedule.time_of(math.inf)) == schedule.t_clean
    assert float(schedule.time_of(-math.inf)) == pytest.approx(schedule.t_max, rel=1e-12)


@quick
@given(schedule=any_schedule, data=st.data())
def test_log_snr_falls_and_is_that_of_alpha_and_sigma(schedule: NoiseSchedule, data: st.DataObject) -> None:
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True)))
    t = torch.tensor([between(schedule, share) for share in shares], dtype=torch.float64)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    assert alpha.dtype == sigma.dtype == log_snr.dtype == torch.float64
    assert bool((log_snr[1:] <= log_snr[:-1]).all())
    assert bool((alpha[1:] <= alpha[:-1]).all())
    assert bool((sigma[1:] >= sigma[:-1]).all())
    assert bool(torch.isfinite(sigma).all())
    torch.testing.assert_close(log_snr, 2 * torch.log(alpha / sigma), rtol=1e-6, atol=1e-9)
    if schedule.prior_scale(schedule.t_max) == 1.0 and not isinstance(schedule, type(make_schedule("flow"))):
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t), rtol=1e-12, atol=0)
    assert float(schedule.alpha(schedule.t_clean)) == 1.0
    assert float(schedule.sigma(schedule.t_clean)) == 0.0


@quick
@given(schedule=any_schedule, data=st.data(), spacing=st.sampled_from(list(Spacing)))
def test_any_number_of_steps_gives_descending_times(
    schedule: NoiseSchedule, data: st.DataObject, spacing: Spacing
) -> None:
    steps = data.draw(st.integers(1, schedule.timesteps))
    if spacing is Spacing.KARRAS and schedule.ends_in_pure_noise:
        with pytest.raises(UserError, match="spacing: karras is not accepted"):
            schedule.times(steps, spacing)
        return
    times = schedule.times(steps, spacing, rho=data.draw(st.sampled_from([1.0, 3.0, 7.0, 20.0])))
    assert len(times) == steps
    assert all(later < earlier for earlier, later in pairwise(times))
    assert schedule.t_min * (1 - 1e-9) <= times[-1]
    assert times[0] <= schedule.t_max
    if spacing is not Spacing.LEADING:
        assert times[0] == schedule.t_max
    if steps > 1 and spacing in (Spacing.KARRAS, Spacing.LINSPACE):
        assert times[-1] == pytest.approx(schedule.t_min, rel=1e-9)


@quick
@given(schedule=any_schedule, data=st.data())
def test_the_posterior_is_bayes_rule(schedule: NoiseSchedule, data: st.DataObject) -> None:
    share_s, share_t = sorted(data.draw(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=2, unique=True)))
    s, t = between(schedule, share_s), between(schedule, share_t)
    a = float(schedule.alpha(t) / schedule.alpha(s)) if float(schedule.alpha(s)) > 0 else 0.0
    variance_s, variance_t = float(schedule.sigma(s)) ** 2, float(schedule.sigma(t)) ** 2
    forward = variance_t - a**2 * variance_s
    if forward < 1e-7 * variance_t or a == 0.0:
        return
    precision = a**2 / forward + 1 / variance_s
    step = schedule.transition(s, t)
    assert float(step.forward_variance) == pytest.approx(forward, rel=1e-6)
    assert float(step.posterior_variance) == pytest.approx(1 / precision, rel=1e-6)
    assert float(step.x_t_coefficient) == pytest.approx(a / forward / precision, rel=1e-6)


@quick
@given(
    schedule=any_schedule,
    prediction=st.sampled_from(["x0", "v", "flow", "edm", "epsilon"]),
    share=st.floats(0, 0.9),
    sigma_data=st.floats(0.1, 2.0),
)
def test_every_prediction_can_be_read_on_every_schedule(
    schedule: NoiseSchedule, prediction: str, share: float, sigma_data: float
) -> None:
    if prediction == "epsilon" and schedule.ends_in_pure_noise:
        return
    process = GaussianProcess(schedule, prediction, sigma_data=sigma_data)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    t = between(schedule, share)
    x_t, output = process.q_sample(x0, t, noise), process.target(x0, t, noise)
    assert bool(torch.isfinite(output).all())
    torch.testing.assert_close(process.predict_x0(x_t, t, output), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.predict_epsilon(x_t, t, output), noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["edm", "ve", "vp", "cosine", "flow"])
def test_edm_preconditioning_is_table_1_and_keeps_unit_variance(schedule: str) -> None:
    """c_skip, c_out, c_in in x / alpha and sigma / alpha; inputs and targets of unit variance (section 5)."""
    noise = make_schedule(schedule)
    process, sigma_data = GaussianProcess(noise, "edm", sigma_data=0.4), 0.4
    t = 0.3 if noise.t_max == 1.0 else noise.t_max / 4
    alpha, sigma = float(noise.alpha(t)), float(noise.sigma(t) / noise.alpha(t))
    x, f = torch.full((1, 1), 0.7, dtype=torch.float64), torch.full((1, 1), -1.3, dtype=torch.float64)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    assert float(process.predict_x0(alpha * x, t, f)) == pytest.approx(c_skip * 0.7 + c_out * -1.3, rel=1e-9)
    assert float(process.network_inputs(alpha * x, t)[0]) == pytest.approx(c_in * 0.7, rel=1e-9)
    x0 = 0.4 * torch.randn(100_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.randn(100_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(process.target(x0, t, z).var()) == pytest.approx(1.0, abs=0.02)
    assert float(process.network_inputs(process.q_sample(x0, t, z), t)[0].var()) == pytest.approx(1.0, abs=0.02)


def test_the_flow_velocity_is_the_derivative_of_the_path() -> None:
    """And sampling along it is Euler's method: x + (s - t) * u."""
    process = GaussianProcess(make_schedule("flow"), "flow")
    x0, noise = torch.randn(2, 1, 2, 2).double(), torch.randn(2, 1, 2, 2).double()
    velocity = (process.q_sample(x0, 0.6, noise) - process.q_sample(x0, 0.4, noise)) / 0.2
    torch.testing.assert_close(process.target(x0, 0.5, noise), velocity)


UNIFORM = keyed_uniform(0, "test", torch.arange(20_000))


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_training_times_are_in_range_and_reach_the_whole_of_it(kind: ScheduleKind) -> None:
    schedule = make_schedule(kind)
    times = schedule.training_times(torch.cat((UNIFORM, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))))
    assert times.dtype == (torch.int64 if kind.is_discrete else torch.float64)
    assert float(times.min()) >= schedule.t_min
    assert float(times.max()) <= schedule.t_max
    if kind is ScheduleKind.EDM:
        log = torch.log(times[:-2])
        assert float(log.mean()) == pytest.approx(-1.2, abs=0.04)
        assert float(log.std()) == pytest.approx(1.2, abs=0.03)
    else:
        place = (times.double() - schedule.t_min) / (schedule.t_max - schedule.t_min)
        assert float(place.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(place.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    process = GaussianProcess(schedule, "x0")
    inputs = process.network_inputs(torch.ones(len(times), 1), times)
    assert all(bool(torch.isfinite(x).all()) for x in inputs)


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_training_and_sampling_tell_a_network_the_same(kind: ScheduleKind) -> None:
    """The loss calls it with a time for each image, a sampler with one number: the same inputs."""
    schedule = make_schedule(kind)
    for prediction in ("x0", "edm"):
        process = GaussianProcess(schedule, prediction)
        t = torch.full((3,), float(between(schedule, 0.5)), dtype=torch.float64)
        if kind.is_discrete:
            t = t.round()
        x_t = torch.randn(3, 1, 2, 2)
        seen: list[tuple[Tensor, Tensor]] = [process.network_inputs(x_t, t), process.network_inputs(x_t, float(t[0]))]
        torch.testing.assert_close(seen[0][0], seen[1][0])
        torch.testing.assert_close(seen[0][1].float(), seen[1][1].float())
        assert seen[0][0].dtype == torch.float32


@pytest.mark.parametrize(("kind", "t"), [("vp", 1.5), ("flow", -0.1), ("ve", math.nan), ("edm", -1.0)])
def test_a_time_outside_is_an_error(kind: str, t: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        make_schedule(kind).sigma(t)


@pytest.mark.parametrize("options", [{"sigma_min": 0.1}, {"beta_start": 0.1}])
def test_options_of_another_schedule_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        make_schedule("flow", **options)
