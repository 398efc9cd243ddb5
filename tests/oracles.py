"""Exact denoisers of known data, and where the probability-flow ODE takes them: the truth that samplers are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusion_core.diffusion import NoiseSchedule, SamplerKind

_VARIANTS: dict[SamplerKind, tuple[dict[str, Any], ...]] = {
    SamplerKind.DDPM: ({"variance": "fixed_large"},),
    SamplerKind.DDIM: ({"eta": 0.5}, {"eta": 1.0}),
    SamplerKind.EULER: ({"churn": 5.0},),
    SamplerKind.HEUN: ({"churn": 5.0},),
    SamplerKind.UNIPC: ({"order": 1}, {"order": 3}),
    SamplerKind.PREDICTOR_CORRECTOR: ({"corrector_steps": 2, "corrector_snr": 0.1},),
}
# Every sampler with its defaults, a new one too, and those that have options with other ones: (kind, options).
EVERY_SAMPLER = [(kind.value, options) for kind in SamplerKind for options in ({}, *_VARIANTS.get(kind, ()))]


@dataclass(frozen=True)
class Mixture:
    """Independent elements, each of a mixture of Gaussians; one component makes a Gaussian."""

    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]

    def marginal(self, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Means, variances and weights of x_t, each (components,) float64."""
        mean, std, weight = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.stds, self.weights))
        return alpha * mean, (alpha * std) ** 2 + sigma**2, weight

    def denoised(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x_t] of each element."""
        mean, variance, weight = (v.to(x_t.dtype) for v in self.marginal(alpha, sigma))
        away = x_t[..., None] - mean
        share = torch.softmax(torch.log(weight) - 0.5 * torch.log(variance) - away**2 / (2 * variance), dim=-1)
        std = torch.tensor(self.stds, dtype=x_t.dtype)
        centre = torch.tensor(self.means, dtype=x_t.dtype) + alpha * std**2 / variance * away
        return (share * centre).sum(dim=-1)

    def cdf(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        mean, variance, weight = self.marginal(alpha, sigma)
        return (weight * torch.special.ndtr((x[..., None] - mean) / variance.sqrt())).sum(dim=-1)

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """Where the ODE takes x from (alpha, sigma) `start` to `end`.

        In one dimension a flow keeps the order of points, and so each point's cumulative probability: found by
        bisection, exact to rounding.
        """
        wanted, low, high = self.cdf(x, *start), torch.full_like(x, -200.0), torch.full_like(x, 200.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle, *end) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


GAUSSIAN = Mixture((0.3,), (0.5,), (1.0,))
BIMODAL = Mixture((-0.6, 0.5), (0.25, 0.35), (0.4, 0.6))


class ExactDenoiser:
    """The denoiser of a schedule whose data is a mixture; counts its calls."""

    def __init__(self, schedule: NoiseSchedule, data: Mixture = GAUSSIAN) -> None:
        self.schedule, self.data, self.calls = schedule, data, 0

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        self.calls += 1
        return self.data.denoised(x_t, *self.at(t))

    def at(self, t: float) -> tuple[float, float]:
        return float(self.schedule.alpha(t)), float(self.schedule.sigma(t))

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        """The exact flow from t to s."""
        return self.data.flow(x, self.at(t), self.at(s))


def even_log_snr(schedule: NoiseSchedule, steps: int, first: float, last: float) -> list[float]:
    """Times of steps + 1 even steps in log-SNR from `first` to `last`: a smooth grid, as orders of convergence need."""
    grid = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return [float(t) for t in schedule.time_of(grid)]


def slopes(errors: list[float]) -> list[float]:
    """Binary logarithm of how much smaller the error gets at each doubling."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
