"""The Gaussian process: closed forms, conversions between predictions, posterior, and the simple loss."""

from __future__ import annotations

import math
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
    Prediction,
    ProcessConfig,
    make_process,
    make_schedule,
)
from diffusion_core.diffusion.losses import simple_loss

PREDICTIONS = [prediction.value for prediction in Prediction]
quick = settings(max_examples=40, deadline=None)


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_q_sample_is_the_closed_form_of_the_chain() -> None:
    """The mean and variance of applying q(x_t | x_{t-1}) = N(sqrt(1 - beta) x, beta) again and again (eq. 2)."""
    schedule = make_schedule("linear", 50)
    assert isinstance(schedule, DiscreteSchedule)
    process = GaussianProcess(schedule)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        assert float(process.q_sample(one, t, zero)) == pytest.approx(mean, rel=1e-12)
        assert float(process.q_sample(zero, t, one)) ** 2 == pytest.approx(variance, rel=1e-12)


def test_each_image_has_its_own_time() -> None:
    process = GaussianProcess(make_schedule("cosine"))
    x0, noise, t = images(), images(seed=1), torch.tensor([0, 10, 500, 999])
    together = process.q_sample(x0, t, noise)
    alone = [process.q_sample(x0[i : i + 1], int(t[i]), noise[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_half_precision_images_get_their_noise_at_the_first_timesteps(kind: str, dtype: torch.dtype) -> None:
    schedule = make_schedule(kind)
    x0, noise = torch.full((1, 1000), 0.9, dtype=dtype), torch.randn(1, 1000).to(dtype)
    for t in (0, 5):
        x_t = GaussianProcess(schedule).q_sample(x0, t, noise)
        assert x_t.dtype == torch.float32
        assert float((x_t - x0.float().mean()).std()) == pytest.approx(float(schedule.sigma(t)), rel=0.1)


@quick
@given(
    kind=st.sampled_from(["linear", "cosine", "sigmoid"]),
    prediction=st.sampled_from(PREDICTIONS),
    timesteps=st.integers(10, 300),
    place=st.floats(0, 0.9),
)
def test_predictions_are_inverse_pairs(kind: str, prediction: str, timesteps: int, place: float) -> None:
    """A perfect output of any kind gives back x0, the noise, v, and itself."""
    process = GaussianProcess(make_schedule(kind, timesteps), prediction)
    x0, noise, t = images(), images(seed=1), place * (timesteps - 1)
    x_t, output = process.q_sample(x0, t, noise), process.target(x0, t, noise)
    close: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(process.predict_x0(x_t, t, output), x0, **close)
    torch.testing.assert_close(process.predict_epsilon(x_t, t, output), noise, **close)
    torch.testing.assert_close(process.predict_v(x_t, t, output), process.target(x0, t, noise, "v"), **close)
    torch.testing.assert_close(process.score(x_t, t, output), -noise / process.schedule.sigma(t), **close)


def test_v_and_score_by_their_definitions() -> None:
    schedule = make_schedule("cosine")
    process = GaussianProcess(schedule, "v")
    x0, noise, t = images(), images(seed=1), 300
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = process.q_sample(x0, t, noise)
    torch.testing.assert_close(process.target(x0, t, noise), alpha * noise - sigma * x0)
    # grad log N(x_t; alpha x0, sigma^2)
    torch.testing.assert_close(process.score(x_t, t, process.target(x0, t, noise)), -(x_t - alpha * x0) / sigma**2)


def test_posterior_is_bayes_rule() -> None:
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions add up."""
    schedule = make_schedule("linear", 100)
    assert isinstance(schedule, DiscreteSchedule)
    x0, x_t = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-0.4]], dtype=torch.float64)
    for t in (1, 2, 40, 99):
        beta, bar = float(schedule.betas[t]), float(schedule.alphas_cumprod[t - 1])
        precision = (1 - beta) / beta + 1 / (1 - bar)
        mean = (math.sqrt(1 - beta) / beta * -0.4 + math.sqrt(bar) / (1 - bar) * 0.7) / precision
        got = GaussianProcess(schedule).posterior(x0, x_t, t)
        assert float(got.mean) == pytest.approx(mean, rel=1e-10)
        assert float(got.variance) == pytest.approx(1 / precision, rel=1e-10)
        assert float(got.log_variance) == pytest.approx(-math.log(precision), rel=1e-10)


def test_the_first_posterior_variance_is_zero_and_its_log_that_of_the_next() -> None:
    process = GaussianProcess(make_schedule("linear"))
    x = images(3)
    got = process.posterior(x, 2 * x, torch.tensor([0, 1, 999]))
    assert got.variance.shape == (3, 1, 1, 1)
    assert float(got.variance[0]) == 0.0
    assert float(got.variance[1]) == pytest.approx(5.4531877e-5, rel=1e-7)
    assert float(got.log_variance[0]) == pytest.approx(math.log(5.4531877e-5), rel=1e-7)
    torch.testing.assert_close(got.mean[0], x[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "vp", "ve", "edm", "flow"])
def test_one_step_for_all_has_no_step_before(kind: str) -> None:
    schedule = make_schedule(kind)
    got = GaussianProcess(schedule, "x0").posterior(images(2), images(2), schedule.t_max, schedule.t_clean)
    assert float(got.variance) == 0.0
    assert float(got.log_variance) == -math.inf
    torch.testing.assert_close(got.mean, images(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["cosine", "flow", "edm"])
def test_half_precision_outputs_are_read_in_float32(kind: str, prediction: str, dtype: torch.dtype) -> None:
    """Only their own rounding counts: as if the same numbers had come in float32."""
    schedule = make_schedule(kind)
    if schedule.ends_in_pure_noise and prediction == "epsilon":
        return
    process, x_t, output = GaussianProcess(schedule, prediction), images().to(dtype), images(seed=1).to(dtype)
    t = schedule.training_times(torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64))
    for read in (process.predict_x0, process.predict_epsilon, process.predict_v, process.score):
        got = read(x_t, t, output)
        assert got.dtype == torch.float32
        assert torch.equal(got, read(x_t.float(), t, output.float()))
    target = process.target(x_t, t, output)
    assert target.dtype == torch.float32
    assert torch.equal(target, process.target(x_t.float(), t, output.float()))


def test_fixed_large_is_beta() -> None:
    schedule = make_schedule("linear")
    assert isinstance(schedule, DiscreteSchedule)
    large = GaussianProcess(schedule, variance="fixed_large").p_step(images(3), images(3), torch.tensor([0, 5, 999]))
    small = GaussianProcess(schedule, variance="fixed_small").p_step(images(3), images(3), torch.tensor([0, 5, 999]))
    torch.testing.assert_close(large.variance.flatten(), schedule.betas[[0, 5, 999]], rtol=1e-9, atol=0)
    torch.testing.assert_close(large.log_variance, torch.log(large.variance))
    assert bool((small.variance < large.variance).all())
    assert torch.equal(small.mean, large.mean)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_losses_are_per_image_mean_squared_errors(prediction: str) -> None:
    process = GaussianProcess(make_schedule("cosine"), prediction)
    x0, noise, t = images().float(), images(seed=1).float(), torch.tensor([1, 5, 100, 900])
    seen: dict[str, Tensor] = {}

    def network(x_t: Tensor, t: Tensor, /, **cond: Tensor) -> Tensor:
        seen.update(cond, x_t=x_t, t=t)
        return torch.zeros_like(x_t)

    losses = process.training_losses(network, x0, t, noise, label=torch.arange(4))
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, process.target(x0, t, noise).square().mean(dim=(1, 2, 3)))
    x_t = process.q_sample(x0, t, noise)
    torch.testing.assert_close(seen["x_t"], process.network_inputs(x_t, t)[0])
    assert torch.equal(seen["x_t"], x_t) or prediction == "edm"
    assert torch.equal(seen["label"], torch.arange(4))
    assert torch.equal(seen["t"], t)
    perfect = process.training_losses(lambda x_t, t, /: process.target(x0, t, noise), x0, t, noise)
    assert torch.equal(perfect, torch.zeros(4))


def test_the_loss_of_half_precision_outputs_is_computed_in_float32() -> None:
    output, target = torch.full((2, 3, 8, 8), 300.0, dtype=torch.float16), torch.zeros(2, 3, 8, 8, dtype=torch.float16)
    loss = simple_loss(output, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [90_000.0, 90_000.0]  # infinite in float16


def test_make_process_reads_its_configuration() -> None:
    config = ProcessConfig.model_validate(
        {"schedule": "linear", "timesteps": 30, "prediction": "v", "variance": "fixed_large"}
    )
    process = make_process(config)
    assert len(process.schedule.times(30)) == 30
    assert process.prediction == "v"
    assert process.variance == "fixed_large"
    torch.testing.assert_close(process.schedule.alpha(7), make_schedule("linear", 30).alpha(7))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"prediction: 'noise'.*epsilon, x0, v"):
        GaussianProcess(make_schedule("linear"), "noise")
    with pytest.raises(UserError, match="variance: 'learned'"):
        GaussianProcess(make_schedule("linear"), variance="learned")


def test_a_schedule_without_signal_at_its_end_is_refused_for_epsilon_only() -> None:
    with pytest.raises(UserError, match="zero terminal SNR"):
        GaussianProcess(make_schedule("flow"), "epsilon")
    process = GaussianProcess(make_schedule("flow"), "v")
    x0, noise = images(), images(seed=1)
    torch.testing.assert_close(process.predict_x0(noise, 1.0, process.target(x0, 1.0, noise)), x0)


def test_any_schedule_with_alpha_and_sigma_has_a_posterior() -> None:
    """Not variance-preserving, real times: compared with Bayes' rule for q(x_t | x_s)."""
    schedule = make_schedule("flow")
    s, t = 0.3, 0.5
    a = 0.5 / 0.7
    forward = 0.5**2 - a**2 * 0.3**2
    precision = a**2 / forward + 1 / 0.3**2
    step = schedule.transition(s, t)
    assert float(step.forward_variance) == pytest.approx(forward)
    assert float(step.posterior_variance) == pytest.approx(1 / precision)
    assert float(step.x_t_coefficient) == pytest.approx(a / forward / precision)
    assert float(step.x0_coefficient) == pytest.approx(0.7 / 0.3**2 / precision)
    last = schedule.transition(0.0, 0.1)
    assert [float(value) for value in last[:3]] == [0.0, 1.0, 0.0]
