"""Training objectives against their papers: plain numbers, the peer library, and what no prediction may change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from diffusion_core.config import UserError, digest, explain
from diffusion_core.diffusion import (
    DiscreteSchedule,
    GaussianProcess,
    Objective,
    ObjectiveConfig,
    Prediction,
    ProcessConfig,
    from_uint8,
    make_process,
    make_schedule,
    training_times,
)
from diffusion_core.diffusion.bound import prior_bits, step_bits
from diffusion_core.diffusion.losses import decoder_nats, gaussian_kl
from diffusion_core.diffusion.objective_config import Weighting, check_objective, timestep_probabilities
from diffusion_core.stages.settings import load_config
from diffusion_core.training import TrainingConfig

quick = settings(max_examples=40, deadline=None)


def objective(**fields: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(fields)


def process_config(**fields: Any) -> ProcessConfig:
    return ProcessConfig.model_validate(fields)


def pixels(n: int = 6, seed: int = 0) -> Tensor:
    """Images of uint8 values in [-1, 1], float64, the darkest and the brightest among them."""
    values = torch.randint(0, 256, (n, 2, 3, 3), generator=torch.Generator().manual_seed(seed))
    values[0, 0, 0] = torch.tensor([0, 255, 128])
    return from_uint8(values.to(torch.uint8)).double()


def noise(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", list(Prediction))
def test_the_default_is_the_simple_loss_to_the_last_bit(prediction: str) -> None:
    process = GaussianProcess(make_schedule("cosine"), prediction)
    x0, t = pixels().float(), torch.tensor([0, 1, 5, 100, 500, 999])

    def network(x: Tensor, t: Tensor, /, shift: float) -> Tensor:
        return torch.tanh(x) + shift

    got = Objective(process)(network, x0, t, noise().float(), shift=0.1)
    assert torch.equal(got, process.training_losses(network, x0, t, noise().float(), shift=0.1))


@quick
@given(means=st.tuples(st.floats(-3, 3), st.floats(-3, 3)), logs=st.tuples(st.floats(-12, 2), st.floats(-12, 2)))
def test_the_divergence_of_gaussians(means: tuple[float, float], logs: tuple[float, float]) -> None:
    values = [torch.tensor(v, dtype=torch.float64) for pair in zip(means, logs, strict=True) for v in pair]
    p, q = (torch.distributions.Normal(mean, torch.exp(0.5 * log)) for mean, log in (values[:2], values[2:]))
    torch.testing.assert_close(gaussian_kl(*values), torch.distributions.kl_divergence(p, q), rtol=1e-9, atol=1e-12)


@quick
@given(mean=st.floats(-1.2, 1.2), log_variance=st.floats(-12, 1))
def test_the_decoder_is_a_distribution_over_pixel_values(mean: float, log_variance: float) -> None:
    values = from_uint8(torch.arange(256).to(torch.uint8)).double()
    nats = decoder_nats(values, torch.tensor(mean), torch.tensor(log_variance))
    assert float(torch.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-5)
    std = math.exp(0.5 * log_variance)

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-(x - mean) / std / math.sqrt(2))

    for k in (0, 1, 100, 254, 255):
        x = k / 127.5 - 1
        high, low = 1.0 if k == 255 else cdf(x + 1 / 255), 0.0 if k == 0 else cdf(x - 1 / 255)
        if high - low > 1e-6:
            assert math.exp(-float(nats[k])) == pytest.approx(high - low, rel=1e-3)


def test_the_decoder_of_impossible_pixels_is_finite_with_a_finite_gradient() -> None:
    """The published code cuts such probabilities off at 1e-12, where the gradient is lost."""
    for dtype in (torch.float32, torch.float64):
        mean = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=dtype, requires_grad=True)
        log_variance = torch.full((5,), -14.0, dtype=dtype, requires_grad=True)
        nats = decoder_nats(from_uint8(torch.arange(256).to(torch.uint8))[:, None].to(dtype), mean, log_variance)
        assert nats.dtype == dtype
        assert bool(torch.isfinite(nats).all())
        nats.sum().backward()
        assert mean.grad is not None and log_variance.grad is not None
        assert bool((torch.isfinite(mean.grad) & torch.isfinite(log_variance.grad)).all())
        assert float(mean.grad[1]) < 0 < float(mean.grad[3])


@quick
@given(
    schedule=st.sampled_from(["linear", "cosine", "sigmoid", "vp", "flow", "edm", "ve"]),
    prediction=st.sampled_from([p for p in Prediction if p is not Prediction.EPSILON]),
    weighting=st.sampled_from([w for w in Weighting if w is not Weighting.NONE]),
    place=st.floats(0.01, 0.97),
)
def test_a_weighting_is_the_same_objective_for_every_prediction(
    schedule: str, prediction: Prediction, weighting: Weighting, place: float
) -> None:
    """The same wrong x0, told in any way, costs the weight of x0 times its squared error."""
    made = make_schedule(schedule)
    t = made.training_times(torch.full((3,), place, dtype=torch.float64))
    x0, wrong, z = pixels(3), noise(3, 5), noise(3)
    losses = []
    for kind in (prediction, Prediction.X0):
        process = GaussianProcess(made, kind)
        x_t = process.q_sample(x0, t, z)
        epsilon = process.predict_epsilon(x_t, t, wrong, "x0")
        output = process.target(wrong, t, epsilon)
        losses.append(Objective(process, objective(weighting=weighting))(lambda x, t, /, o=output: o, x0, t, z))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=1e-12)
    snr = torch.exp(made.log_snr(t))
    weight = {
        Weighting.MIN_SNR: torch.minimum(snr, torch.tensor(5.0)),
        Weighting.P2: snr / (1.0 + snr),
        Weighting.EDM: snr + 4.0,
    }[weighting]
    torch.testing.assert_close(losses[1], weight * (wrong - x0).square().mean(dim=(1, 2, 3)), rtol=1e-10, atol=0)


def test_min_snr_of_the_paper() -> None:
    """Hang et al. 2023, section 3.4: min(SNR, 5) / SNR for the noise, / (SNR + 1) for v."""
    schedule, t = make_schedule("linear"), torch.arange(1000)
    assert isinstance(schedule, DiscreteSchedule)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    for prediction, divisor in (("epsilon", snr), ("v", snr + 1), ("x0", torch.ones(1000))):
        weight = Objective(GaussianProcess(schedule, prediction), objective(weighting="min_snr")).weight(t)
        torch.testing.assert_close(weight, snr.clamp(max=5.0) / divisor, rtol=1e-10, atol=0)


def test_the_loss_of_edm_is_that_of_its_paper() -> None:
    """Karras et al. 2022, eq. 2 and 8 with table 1: lambda(sigma) * |D(y + n; sigma) - y|^2, for any network F."""
    process = GaussianProcess(make_schedule("edm"), "edm", sigma_data=0.5)
    y, z, sigma = pixels(), noise(), torch.tensor([0.002, 0.1, 0.5, 1.0, 9.0, 80.0], dtype=torch.float64)
    s = sigma[:, None, None, None]
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / torch.sqrt(s**2 + 0.25)
    c_in = 1 / torch.sqrt(s**2 + 0.25)
    x = y + s * z
    denoised = c_skip * x + c_out * torch.tanh(c_in * x + 0.1)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * (denoised - y).square().mean(dim=(1, 2, 3))
    for kind in ("none", "edm"):  # for this prediction they are one
        loss = Objective(process, objective(weighting=kind))(lambda x, t, /: torch.tanh(x + 0.1), y, sigma, z)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def scalar_bound(x0: float, x_t: float, t: int, x0_hat: float, v: float | None, large: bool = False) -> float:
    """Ho et al. 2020, eq. 5 to 13, and Nichol & Dhariwal 2021, eq. 15, on plain numbers: nats of one element."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    bar, before, beta = bars[t + 1], bars[t], betas[t]

    def mean(x: float) -> float:
        return math.sqrt(before) * beta / (1 - bar) * x + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x_t

    first = (1 - bars[1]) / (1 - bars[2]) * betas[1]
    small = (1 - before) / (1 - bar) * beta if t else first
    variance = beta if large else small
    if v is not None:
        variance = math.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small))
    if t:
        return 0.5 * (math.log(variance / small) + (small + (mean(x0) - mean(x0_hat)) ** 2) / variance - 1)
    up, down = ((x0 - mean(x0_hat) + side / 255) / math.sqrt(2 * variance) for side in (1, -1))
    high, low = 1.0 if x0 > 0.999 else 0.5 * math.erfc(-up), 0.0 if x0 < -0.999 else 0.5 * math.erfc(-down)
    return -math.log(high - low)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_terms_of_the_bound_on_plain_numbers(variance: str) -> None:
    process = GaussianProcess(make_schedule("linear"), "epsilon", variance)
    x0, z, t = pixels(), noise(), torch.tensor([0, 1, 2, 300, 999, 0])
    x_t = process.q_sample(x0, t, z)
    x0_hat, v = x0 + 0.003 * noise(6, 3), torch.tanh(noise(6, 4))
    fraction = (v + 1) / 2 if variance == "learned_range" else None
    got = step_bits(process, x0, x_t, t, x0_hat, fraction)
    for n in range(6):
        elements = zip(*(x[n].flatten().tolist() for x in (x0, x_t, x0_hat, v)), strict=True)
        nats = [
            scalar_bound(a, b, int(t[n]), c, d if fraction is not None else None, variance == "fixed_large")
            for a, b, c, d in elements
        ]
        assert float(got[n]) == pytest.approx(sum(nats) / len(nats) / math.log(2), rel=1e-6)
    bar = float(process.schedule.alpha(999.0)) ** 2
    prior = 0.5 * (-bar - math.log(1 - bar) + bar * x0.square().mean(dim=(1, 2, 3))) / math.log(2)
    torch.testing.assert_close(prior_bits(process, x0), prior, rtol=1e-6, atol=1e-12)


def test_hybrid_trains_the_mean_by_the_simple_loss_and_the_variance_by_the_bound() -> None:
    process = GaussianProcess(make_schedule("cosine"), "v", "learned_range")
    x0, z, t = pixels(), noise(), torch.tensor([0, 1, 30, 300, 700, 999])
    output = 0.3 * torch.cat((noise(6, 7), noise(6, 8)), dim=1)

    def gradient(loss: Any) -> tuple[Tensor, Tensor]:
        leaf = output.clone().requires_grad_()
        value = loss(lambda x, t, /: leaf, x0, t, z)
        (found,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), found

    hybrid, of_hybrid = gradient(Objective(process, objective(loss="hybrid", bound_weight=0.01)))
    simple, of_simple = gradient(process.training_losses)
    bound, of_bound = gradient(Objective(process, objective(loss="vlb")))
    torch.testing.assert_close(hybrid, simple + 0.01 * bound)
    torch.testing.assert_close(of_hybrid[:, :2], of_simple[:, :2], rtol=1e-12, atol=0)
    torch.testing.assert_close(of_hybrid[:, 2:], 0.01 * of_bound[:, 2:], rtol=1e-12, atol=1e-15)
    assert bool((of_simple[:, 2:] == 0).all())
    assert bool((of_bound[:, :2] != 0).any())
    x_t = process.q_sample(x0, t, z)
    x0_hat = process.predict_x0(x_t, t, output[:, :2])
    torch.testing.assert_close(bound, 1000 * step_bits(process, x0, x_t, t, x0_hat, (output[:, 2:] + 1) / 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["simple", "hybrid", "vlb"])
def test_losses_of_half_precision_outputs_are_computed_in_float32(loss: str, dtype: torch.dtype) -> None:
    process = GaussianProcess(make_schedule("cosine"), "v", "fixed_small" if loss == "simple" else "learned_range")
    x0, z, t = pixels().float(), noise().float(), torch.tensor([0, 1, 30, 300, 700, 999])
    output = torch.cat((noise(6, 7), noise(6, 8)), dim=1)[:, : 2 if loss == "simple" else 4].to(dtype)
    got, exact = (
        Objective(process, objective(loss=loss))(lambda x, t, /, o=o: o, x0, t, z) for o in (output, output.float())
    )
    assert got.dtype == torch.float32
    assert torch.equal(got, exact)


@quick
@given(table=st.lists(st.floats(0.01, 100), min_size=2, max_size=20), timesteps=st.integers(20, 300))
def test_importance_keeps_the_mean_of_the_loss(table: list[float], timesteps: int) -> None:
    probabilities = torch.tensor(timestep_probabilities(tuple(table), timesteps), dtype=torch.float64)
    assert float(probabilities.sum()) == pytest.approx(1, rel=1e-12)
    assert bool((probabilities > 0).all())
    config = objective(times="importance", importance=table)
    process = process_config(timesteps=timesteps)
    made, t = Objective(make_process(process), config), torch.arange(timesteps)
    x0, z = pixels(1).expand(timesteps, 2, 3, 3), noise(1).expand(timesteps, 2, 3, 3)
    weighted = made(lambda x, t, /: torch.tanh(x), x0, t, z)
    plain = make_process(process).training_losses(lambda x, t, /: torch.tanh(x), x0, t, z)
    assert float((probabilities * weighted).sum()) == pytest.approx(float(plain.mean()), rel=1e-9)
    n = 50 * timesteps  # evenly spread variates draw each timestep in its proportion
    drawn = training_times(process, config)((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    counts = torch.bincount(drawn, minlength=timesteps)
    torch.testing.assert_close(counts / n, probabilities.float(), rtol=0, atol=1.1 / n)


def test_an_even_table_draws_what_the_schedule_draws() -> None:
    uniform = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    process = process_config(timesteps=64)
    even = training_times(process, objective(times="importance", importance=[3, 3, 3, 3]))(uniform)
    assert torch.equal(even, training_times(process, ObjectiveConfig())(uniform))
    assert torch.equal(even, make_schedule("cosine", 64).training_times(uniform))


def test_times_of_flow_and_edm_follow_their_distributions() -> None:
    uniform = torch.tensor([0.0, 0.1, 0.5, 0.9, 1 - 1e-16], dtype=torch.float64)
    z = torch.special.ndtri(uniform[1:4])
    flow = process_config(schedule="flow", prediction="flow")
    t = training_times(flow, objective(times="logit_normal", time_mean=0.5, time_std=2))(uniform)
    torch.testing.assert_close(torch.logit(t[1:4]), 0.5 + 2 * z)
    assert (float(t[0]), float(t[4])) == (0.001, pytest.approx(1.0))
    standard = training_times(flow, objective(times="logit_normal"))(uniform)
    torch.testing.assert_close(torch.logit(standard[1:4]), z)
    edm = process_config(schedule="edm", prediction="edm", sigma_max=40)
    sigma = training_times(edm, objective(time_mean=-0.4, time_std=1.0))(uniform)
    torch.testing.assert_close(torch.log(sigma[1:4]), -0.4 + z)
    assert (float(sigma[0]), float(sigma[4])) == (0.002, 40.0)
    published = training_times(edm, ObjectiveConfig())(uniform)
    torch.testing.assert_close(torch.log(published[1:4]), -1.2 + 1.2 * z)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bound_weight": 0.1}, "bound_weight is for the loss hybrid only"),
        ({"min_snr_gamma": 1}, "min_snr_gamma is for the weighting min_snr only"),
        ({"weighting": "min_snr", "p2_k": 2}, "p2_k is for the weighting p2 only"),
        ({"importance": [1, 2]}, "importance is for the times importance only"),
        ({"times": "importance"}, "needs the table importance, of at least two numbers"),
        ({"times": "importance", "importance": [1, 0]}, "importance.1: 0 is not accepted"),
        ({"loss": "vlb", "weighting": "p2"}, "weighting p2 is not accepted with the loss vlb"),
        ({"loss": "l2"}, "loss: 'l2' is not accepted"),
    ],
)
def test_an_objective_that_contradicts_itself_is_one_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ObjectiveConfig.model_validate(fields)
    assert words in explain(caught.value)


@pytest.mark.parametrize(
    ("fields", "process", "words"),
    [
        ({}, {"variance": "learned_range"}, r"a\.loss: simple does not train the process\.variance learned_range"),
        ({"loss": "hybrid"}, {}, r"a\.loss: hybrid trains a learned variance.*fixed_small"),
        ({"loss": "vlb"}, {"schedule": "vp"}, r"a\.loss: vlb is for the schedules with timesteps"),
        ({"times": "importance", "importance": [1, 2]}, {"schedule": "vp"}, r"a\.times: importance is for"),
        ({"times": "importance", "importance": [1, 2, 3]}, {"timesteps": 2}, r"a\.importance: 3 numbers are more"),
        ({"times": "logit_normal"}, {}, r"a\.times: logit_normal is for the schedule flow"),
        ({"time_mean": 1}, {}, r"a\.time_mean: 1\.0 is not accepted"),
    ],
)
def test_an_objective_that_does_not_suit_the_process_is_one_sentence(
    fields: dict[str, Any], process: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_objective("a", objective(**fields), process_config(**process))


def test_objectives_that_suit_are_accepted() -> None:
    check_objective("a", ObjectiveConfig(), ProcessConfig())
    check_objective("a", objective(loss="hybrid"), process_config(variance="learned_range"))
    check_objective("a", objective(loss="vlb"), process_config(variance="fixed_large"))
    check_objective("a", objective(time_mean=-0.4), process_config(schedule="edm", prediction="edm"))
    flow = process_config(schedule="flow", prediction="flow")
    check_objective("a", objective(times="logit_normal", time_std=0.5), flow)


def test_it_is_set_from_the_command_and_the_ids_of_older_runs_stay() -> None:
    chosen = [
        "process.variance=learned_range",
        "training.objective.loss=hybrid",
        "training.objective.bound_weight=0.01",
    ]
    config = load_config("digits", settings=chosen)
    assert config.training.objective == objective(loss="hybrid", bound_weight=0.01)
    table = load_config("digits", settings=["training.objective={times: importance, importance: [1, 2, 3]}"])
    assert table.training.objective.importance == (1.0, 2.0, 3.0)
    assert digest(TrainingConfig()) == "6bf7382bfc8f8d54"  # of the first release
    assert digest(TrainingConfig(objective=objective(loss="vlb"))) != digest(TrainingConfig())
