"""Likelihood of images whose truth is known: the exact one by the ODE, and the bound with its closed-form gaps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion import (
    Denoiser,
    GaussianProcess,
    KeyedNoise,
    NoiseSchedule,
    from_uint8,
    images_to_network,
    make_schedule,
    to_uint8,
)
from diffusion_core.diffusion.denoiser import Estimate
from diffusion_core.diffusion.likelihood import dequantised, log_likelihood, timestep_rms, variational_bound
from diffusion_core.networks import UNetConfig, build_network
from tests.oracles import BIMODAL, GAUSSIAN, ExactDenoiser, Mixture, slopes

SCHEDULES = ["linear", "scaled_linear", "cosine", "quadratic", "sigmoid", "vp", "ve", "edm", "flow"]


def keyed(n: int, purpose: str = "likelihood") -> KeyedNoise:
    return KeyedNoise(0, torch.arange(n), purpose)


def quantiles(data: Mixture, n: int) -> Tensor:
    """Points (n, 1, 1, 2) that are distributed as the data, the second element in another order."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = data.flow(torch.special.ndtri(p), (0.0, 1.0), (1.0, 0.0))
    return torch.stack((x, x[torch.arange(n) * 7 % n]), dim=1)[:, None, None]


def log_density(data: Mixture, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Nats of each element."""
    mean, variance, weight = data.marginal(alpha, sigma)
    away = x[..., None] - mean
    return torch.logsumexp(torch.log(weight) - 0.5 * torch.log(2 * math.pi * variance) - away**2 / variance / 2, dim=-1)


def model_density(denoiser: ExactDenoiser, x0: Tensor) -> Tensor:
    """Of x_t / alpha at t_min if the exact flow brings it there from the noise that sampling starts from: nats (N,)."""
    schedule = denoiser.schedule
    start, end = denoiser.at(schedule.t_min), denoiser.at(schedule.t_max)
    x_T = denoiser.data.flow(start[0] * x0, start, end)
    prior = torch.distributions.Normal(0.0, schedule.prior_scale(schedule.t_max)).log_prob(x_T)
    here = log_density(denoiser.data, start[0] * x0, *start) + math.log(start[0])
    return (here - log_density(denoiser.data, x_T, *end) + prior).flatten(1).sum(dim=1)


@pytest.mark.parametrize(
    ("kind", "data"), [*((kind, BIMODAL) for kind in SCHEDULES), ("zero terminal SNR", BIMODAL), ("cosine", GAUSSIAN)]
)
def test_the_exact_likelihood_is_the_analytic_one(kind: str, data: Mixture) -> None:
    zero = kind not in SCHEDULES
    schedule = make_schedule("cosine", rescale_zero_terminal_snr=True) if zero else make_schedule(kind)
    denoiser, x0 = ExactDenoiser(schedule, data), quantiles(data, 50)
    got = log_likelihood(schedule, denoiser, x0, keyed(50), steps=60)
    torch.testing.assert_close(got.log_density, model_density(denoiser, x0), rtol=0, atol=1e-4)
    truth = log_density(data, x0, 1.0, 0.0).flatten(1).sum(dim=1)  # of the data, which the model comes close to
    expected = math.log2(127.5) - truth / (2 * math.log(2))
    assert float(got.bits_per_dim.mean()) == pytest.approx(float(expected.mean()), abs=0.01)


@pytest.mark.parametrize("kind", ["cosine", "edm", "flow"])
def test_the_error_is_of_fourth_order(kind: str) -> None:
    schedule = make_schedule(kind)
    x0 = quantiles(BIMODAL, 20)
    densities = [
        log_likelihood(schedule, ExactDenoiser(schedule, BIMODAL), x0, keyed(20), steps).log_density
        for steps in (20, 40, 80, 320)
    ]
    errors = [float((density - densities[-1]).abs().max()) for density in densities[:-1]]
    assert all(3.5 < slope < 4.6 for slope in slopes(errors)), (errors, slopes(errors))


class Correlated:
    """The exact denoiser of a Gaussian of three elements that depend on each other: its Jacobian is not diagonal."""

    covariance = torch.tensor([[0.3, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.2]], dtype=torch.float64)

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        gain = alpha * self.covariance @ torch.linalg.inv(alpha**2 * self.covariance + sigma**2 * torch.eye(3))
        return (x_t.flatten(1) @ gain.T).reshape(x_t.shape)


def test_hutchinsons_estimate_is_right_on_average_with_either_probe_and_better_with_more() -> None:
    schedule, n = make_schedule("cosine"), 4000
    x0 = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64).reshape(1, 1, 1, 3)
    blurred = Correlated.covariance + (schedule.sigma(0) / schedule.alpha(0)) ** 2 * torch.eye(3)
    truth = float(torch.distributions.MultivariateNormal(torch.zeros(3).double(), blurred).log_prob(x0.flatten()))
    spread = {}
    for probe, probes in (("rademacher", 1), ("normal", 1), ("rademacher", 4)):
        likelihood = log_likelihood(
            schedule,
            Correlated(schedule),
            x0.expand(n, 1, 1, 3),
            keyed(n),
            steps=20,
            probes=probes,
            probe=probe,  # type: ignore[arg-type]
        )
        found, error = likelihood.log_density, likelihood.standard_error
        spread[probe, probes] = float(found.std())
        if probes == 1:
            assert bool(error.isnan().all()), "one probe does not tell how far it may be off"
        else:
            told = float(error.square().mean().sqrt())
            assert told == pytest.approx(float(likelihood.bits_per_dim.std()), rel=0.1)
        assert float(found.mean()) == pytest.approx(truth, abs=4 * float(found.std()) / math.sqrt(n) + 1e-3)
    assert spread["rademacher", 1] < spread["normal", 1]
    assert spread["rademacher", 4] == pytest.approx(spread["rademacher", 1] / 2, rel=0.1)


class Optimal(ExactDenoiser):
    """The exact denoiser of Gaussian data that also tells where the variance of p(x_s | x_t) lies, or `off` from it."""

    off = 0.0

    def __init__(self, schedule: NoiseSchedule, data: Mixture, times: list[float]) -> None:
        super().__init__(schedule, data)
        self.earlier = dict(zip(times, [*times[1:], schedule.t_clean], strict=True))

    def variances(self, t: float) -> tuple[float, float, float]:
        """The best, the posterior's (with its floor) and the forward step's, of the step from t."""
        process = GaussianProcess(self.schedule, "x0", "fixed_large")
        x, s = torch.zeros(1, 1), self.earlier[t]
        step = self.schedule.transition(s, t)
        alpha, sigma = self.at(t)
        std = self.data.stds[0]
        unknown = (std * sigma) ** 2 / ((alpha * std) ** 2 + sigma**2)  # the variance of x0, given x_t
        best = float(step.posterior_variance) + float(step.x0_coefficient) ** 2 * unknown
        low, high = process.posterior(x, x, t, s).log_variance, process.p_step(x, x, t, s).log_variance
        return best, math.exp(float(low)), math.exp(float(high))

    def estimate(self, x_t: Tensor, t: float) -> Estimate:
        best, low, high = (math.log(variance) for variance in self.variances(t))
        return Estimate(self(x_t, t), torch.tensor((best - low) / (high - low) + self.off))


NARROW = Mixture((0.1,), (0.2,), (1.0,))


def rounded(data: Mixture, n: int, size: int = 16) -> Tensor:
    """Images of pixel values, float64."""
    z = keyed(n, "images").normal((1, size, size), 0, dtype=torch.float64)
    return from_uint8(to_uint8(data.means[0] + data.stds[0] * z)).double()


def pixel_bits(data: Mixture, x0: Tensor) -> Tensor:
    """-log2 of the probability that the data round to these pixels, the mean of each image."""
    inside = data.cdf(x0 + 1 / 255, 1.0, 0.0) - data.cdf(x0 - 1 / 255, 1.0, 0.0)
    return -torch.log2(inside).flatten(1).mean(dim=1)


class Quantiles:
    """Noise without chance: in each image the same quantiles of the normal distribution, of unit variance."""

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
        p = (torch.arange(math.prod(shape), dtype=dtype) + 0.5) / math.prod(shape)
        z = torch.special.ndtri(p)
        return (z / z.square().mean().sqrt()).reshape(1, *shape)


def expected_bits(variance: str, denoiser: Optimal) -> tuple[float, float]:
    """The bound of all pixel values in their frequency, without chance, and the truth."""
    values = from_uint8(torch.arange(256).to(torch.uint8)).double()
    x0 = values.reshape(256, 1, 1, 1).expand(256, 1, 1, 50)
    bits = pixel_bits(denoiser.data, values[:, None])
    process = GaussianProcess(denoiser.schedule, "x0", variance)
    bound = variational_bound(process, denoiser, x0, Quantiles())
    return float((2**-bits * bound.total).sum()), float((2**-bits * bits).sum())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("vp", {}),
        ("ve", {"sigma_min": 0.08}),
        ("edm", {"sigma_min": 0.03}),
        ("flow", {}),
    ],
)
def test_the_bound_is_tight_with_the_best_variance_and_misses_by_its_gap_with_the_fixed_ones(
    kind: str, options: dict[str, float]
) -> None:
    """The gap of a step is KL between two Gaussians of one mean; that of L_0 is nearly so, as pixels are narrow."""
    schedule = make_schedule(kind, 30, **options)
    denoiser = Optimal(schedule, NARROW, schedule.times(30))
    tight, truth = expected_bits("learned_range", denoiser)
    assert tight == pytest.approx(truth, abs=0.01)
    for denoiser.off in (-0.1, 0.1):  # the loss that trains the variance is least at the best one
        assert expected_bits("learned_range", denoiser)[0] > tight
    for place, variance in ((1, "fixed_small"), (2, "fixed_large")):
        gap = 0.0
        for t in schedule.times(30):
            ratio = denoiser.variances(t)[0] / denoiser.variances(t)[place]
            gap += 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)
        assert gap > 0.05
        assert expected_bits(variance, denoiser)[0] - truth == pytest.approx(gap, abs=0.01)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(SCHEDULES),
    steps=st.integers(2, 12),
    cut=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_likelihood_of_an_image_does_not_depend_on_its_batch(
    kind: str, steps: int, cut: int, dtype: torch.dtype
) -> None:
    schedule = make_schedule(kind, 40)
    process, x0 = GaussianProcess(schedule, "x0"), rounded(GAUSSIAN, 5, 4).to(dtype)

    def found(rows: slice) -> tuple[Tensor, ...]:
        noise = KeyedNoise(3, torch.arange(5)[rows])
        bound = variational_bound(process, ExactDenoiser(schedule), x0[rows], noise, steps)
        exact = log_likelihood(schedule, ExactDenoiser(schedule), x0[rows], noise, steps)
        torch.testing.assert_close(bound.total, bound.prior + bound.steps.sum(dim=1))
        assert bound.steps.shape == (len(x0[rows]), steps)
        assert bool((bound.steps[:, :-1] >= -1e-6).all()), "a divergence is never negative"
        return bound.total, bound.prior, exact.log_density

    whole = found(slice(None))
    parts = zip(found(slice(cut)), found(slice(cut, None)), strict=True)
    for one, (first, second) in zip(whole, parts, strict=True):
        assert bool(torch.isfinite(one).all())
        torch.testing.assert_close(torch.cat((first, second)), one, rtol=1e-6, atol=1e-6)


def test_dequantised_pixels_round_back_and_fill_their_range() -> None:
    pixels = torch.arange(256).to(torch.uint8).reshape(16, 4, 4, 1)
    x = dequantised(pixels, keyed(16))
    assert x.shape == (16, 1, 4, 4)
    assert x.dtype == torch.float32
    away = (x - images_to_network(pixels)) * 127.5
    assert -0.5 <= float(away.min()) < -0.48 and 0.48 < float(away.max()) <= 0.5
    assert torch.equal(to_uint8(x.double()).permute(0, 2, 3, 1), pixels)
    assert torch.equal(dequantised(pixels[3:5], KeyedNoise(0, [3, 4], "likelihood")), x[3:5])


def test_the_density_of_dequantised_pixels_bounds_their_bits() -> None:
    schedule, n = make_schedule("flow"), 40
    x0 = rounded(NARROW, n, 8)
    pixels = to_uint8(x0).permute(0, 2, 3, 1)
    points = dequantised(pixels, keyed(n)).double()
    bits = log_likelihood(schedule, ExactDenoiser(schedule, NARROW), points, keyed(n), steps=40).bits_per_dim
    assert float(bits.mean()) == pytest.approx(float(pixel_bits(NARROW, x0).mean()), abs=0.01)


def test_networks_have_a_likelihood() -> None:
    """A network with a learned variance, trained at whole timesteps and asked in between."""
    torch.manual_seed(0)
    network = build_network(
        UNetConfig(base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1), (8, 8, 1), 2, 2
    )
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    network.eval().requires_grad_(False)
    process = GaussianProcess(make_schedule("cosine", 100), "v", "learned_range")
    label = torch.tensor([0, 1, 1])
    denoiser = Denoiser(process, network, {"label": label})
    x0 = rounded(GAUSSIAN, 3, 8).float()
    bound = variational_bound(process, denoiser, x0, keyed(3), steps=10)
    exact = log_likelihood(process.schedule, denoiser, x0, keyed(3), steps=3)
    assert bool((bound.total > 1).all()) and bool(torch.isfinite(exact.log_density).all())
    assert not bound.total.requires_grad and not exact.bits_per_dim.requires_grad
    with pytest.raises(ValueError, match="needs `fraction`"):
        variational_bound(process, lambda x, t: x, x0, keyed(3), steps=10)


def test_the_best_table_of_importance_comes_from_a_bound() -> None:
    schedule = make_schedule("cosine", 60)
    bound = variational_bound(GaussianProcess(schedule, "x0"), ExactDenoiser(schedule), rounded(GAUSSIAN, 4), keyed(4))
    table = timestep_rms(bound.steps, 4)
    expected = bound.steps[:, 45:].square().mean().sqrt()  # the least noise, which is the last 15 steps
    assert table[0] == pytest.approx(float(expected))
    assert table[0] == max(table)
    assert timestep_rms(bound.steps.square().mean(dim=0, keepdim=True).sqrt(), 4) == pytest.approx(table)
    with pytest.raises(UserError, match="ranges: 61 is not accepted"):
        timestep_rms(bound.steps, 61)


@pytest.mark.parametrize("timesteps", [10, 64, 1003])
def test_the_table_of_importance_is_cut_as_it_is_read(timesteps: int) -> None:
    """Ranges that do not divide the timesteps: each takes its share of the timestep that it ends in."""
    steps = torch.rand(1, timesteps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tenths = steps.flip(1).repeat_interleave(10, dim=1).square().reshape(10, timesteps)
    assert timestep_rms(steps, 10) == pytest.approx(tenths.mean(dim=1).sqrt().tolist())


def test_impossible_likelihoods_are_refused() -> None:
    schedule = make_schedule("cosine", 60)
    denoiser, x0 = ExactDenoiser(schedule), rounded(GAUSSIAN, 2)
    with pytest.raises(UserError, match="steps: 1 is not accepted: a bound needs at least 2"):
        variational_bound(GaussianProcess(schedule, "x0"), denoiser, x0, keyed(2), 1)
    with pytest.raises(UserError, match="steps: 61"):
        variational_bound(GaussianProcess(schedule, "x0"), denoiser, x0, keyed(2), 61)
    with pytest.raises(UserError, match="steps: 5 with 0 probes"):
        log_likelihood(schedule, denoiser, x0, keyed(2), 5, probes=0)
