"""Ancestral sampling: the reverse Markov chain of the process (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from diffusion_core.diffusion.config import SamplerConfig, Spacing, Variance
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.samplers.base import Sampler
from diffusion_core.diffusion.schedules import NoiseSchedule


class AncestralSampler(Sampler):
    """DDPM on any list of times: the step from t to s uses q(x_s | x_t, x0_hat), as if these were all the timesteps.

    Args:
        variance: fixed_small, the posterior's (eq. 7), or fixed_large, that of the forward step from s to t.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        spacing: Spacing | str = Spacing.TRAILING,
        times: Sequence[float] | None = None,
        variance: Variance | str = Variance.FIXED_SMALL,
    ) -> None:
        super().__init__(schedule, steps, spacing, times)
        self.variance = Variance(variance)

    @classmethod
    def from_config(cls, config: SamplerConfig, process: GaussianProcess) -> AncestralSampler:
        return cls(process.schedule, config.steps, config.spacing, variance=process.variance)

    def step(self, x_t: Tensor, x0_hat: Tensor, t: float, s: float, draw: Callable[[], Tensor]) -> Tensor:
        step = self.schedule.transition(s, t)
        mean = float(step.x_t_coefficient) * x_t + float(step.x0_coefficient) * x0_hat
        if s == self.schedule.t_clean:  # no noise on the result, whatever the variance
            return mean
        variance = step.forward_variance if self.variance is Variance.FIXED_LARGE else step.posterior_variance
        return mean + math.sqrt(float(variance)) * draw()
