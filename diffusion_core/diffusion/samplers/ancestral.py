"""Ancestral sampling: the reverse Markov chain of the process (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

import math
from typing import Any, Self

from torch import Tensor

from diffusion_core.diffusion.config import SamplerConfig, Variance
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.samplers.base import Move, Sampler
from diffusion_core.diffusion.schedules import NoiseSchedule


class AncestralSampler(Sampler):
    """DDPM on any list of times: the step from t to s uses q(x_s | x_t, x0_hat), as if these were all the timesteps.

    Args:
        variance: fixed_small, the posterior's (eq. 7), or fixed_large, that of the forward step from s to t.
        grid: which times are visited, as in `Sampler`.
    """

    def __init__(
        self, schedule: NoiseSchedule, steps: int, *, variance: Variance | str = Variance.FIXED_SMALL, **grid: Any
    ) -> None:
        super().__init__(schedule, steps, **grid)
        self.variance = Variance(variance)

    @classmethod
    def from_config(cls, config: SamplerConfig, process: GaussianProcess) -> Self:
        return cls(process.schedule, config.steps, variance=process.variance, **config.options())

    def step(self, move: Move) -> Tensor:
        step = self.schedule.transition(move.s, move.t)
        mean = float(step.x_t_coefficient) * move.x_t + float(step.x0_coefficient) * move.x0_hat
        if move.last:  # no noise on the result, whatever the variance
            return mean
        variance = step.forward_variance if self.variance is Variance.FIXED_LARGE else step.posterior_variance
        return mean + math.sqrt(float(variance)) * move.draw()
