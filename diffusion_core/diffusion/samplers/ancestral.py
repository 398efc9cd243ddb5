"""Ancestral sampling: the reverse Markov chain of the process (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from diffusion_core.diffusion.config import SamplerConfig
from diffusion_core.diffusion.kinds import Variance
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.samplers.base import Move, Sampler
from diffusion_core.diffusion.schedules import NoiseSchedule


class AncestralSampler(Sampler):
    """DDPM on any list of times: the step from t to s uses q(x_s | x_t, x0_hat), as if these were all the timesteps.

    Args:
        variance: fixed_small, the posterior's (eq. 7), fixed_large, that of the forward step from s to t, or
            learned_range, between the two where the network says. All are those of the visited times, so that they fit
            a few steps as well as all (Nichol & Dhariwal 2021, section 4).
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
        learned = self.variance is Variance.LEARNED_RANGE and not move.last
        fraction = move.fraction if learned else None  # before x0_hat, which comes with it
        step = self.schedule.transition(move.s, move.t)
        mean = float(step.x_t_coefficient) * move.x_t + float(step.x0_coefficient) * move.x0_hat
        if move.last:  # no noise on the result, whatever the variance
            return mean
        if fraction is not None:  # Nichol & Dhariwal 2021, eq. 15
            low, high = math.log(float(step.posterior_variance)), math.log(float(step.forward_variance))
            return mean + torch.exp(0.5 * (low + fraction.to(mean.dtype) * (high - low))) * move.draw()
        variance = step.forward_variance if self.variance is Variance.FIXED_LARGE else step.posterior_variance
        return mean + math.sqrt(float(variance)) * move.draw()
