"""Euler's and Heun's method on the probability-flow ODE, with churn (Karras et al. 2022, algorithms 1 and 2)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.samplers.base import Move, Sampler
from diffusion_core.diffusion.schedules import NoiseSchedule

# Above this sigma / alpha a schedule counts as ending in pure noise; the largest of EDM is 80, of Ho et al. 157.
NOISIEST = 1000.0


class EulerSampler(Sampler):
    """Euler's method. Without churn this is DDIM with eta = 0, whatever variable the ODE is written in.

    The ODE is solved for x / c as a function of q = sigma / c. With c = alpha, q is the sigma of the paper and the
    slope is epsilon_hat (algorithm 2). Where alpha is 0 or nearly so at the start (flow matching, zero terminal SNR,
    cosine), c is alpha + sigma, and the slope epsilon_hat - x0_hat: the ODE of flow matching, in which nothing gets
    large. There the peer's x / alpha takes a first step so wide that it multiplies the network's error by hundreds.

    Args:
        churn: S_churn, how much noise is added over all steps: each raises sigma / alpha by churn / steps of itself, at
            most by sqrt(2) - 1, before it goes down, though never beyond what the network was trained at. 0 is none.
        churn_min, churn_max: S_tmin and S_tmax, the sigma / alpha between which noise is added; None is no limit.
        churn_noise: S_noise, the standard deviation of that noise.
        grid: which times are visited, as in `Sampler`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        *,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float | None = None,
        churn_noise: float = 1.0,
        **grid: Any,
    ) -> None:
        super().__init__(schedule, steps, **grid)
        if churn < 0.0:
            raise UserError(f"churn: {churn} is not accepted: it must be 0 or more.")
        self.raised_by = min(churn / steps, math.sqrt(2.0) - 1.0)
        self.churn_range = (churn_min, math.inf if churn_max is None else churn_max)
        self.churn_noise = churn_noise
        self._bounded = schedule.ends_in_pure_noise or self.ratio(schedule.t_max) > NOISIEST

    def step(self, move: Move) -> Tensor:
        self._churn(move)
        if move.last:
            return move.x0_hat
        return self._euler(move, self._slope(move.x_t, move.x0_hat, move.t))

    def _churn(self, move: Move) -> None:
        """Lines 4 to 6 of algorithm 2: x_t with noise added, at the time where that much noise belongs."""
        ratio = self.ratio(move.t)
        low, high = self.churn_range
        if self.raised_by == 0.0 or not low <= ratio <= high or math.isinf(ratio):
            return
        raised = float(self.schedule.time_of(-2.0 * math.log(ratio * (1.0 + self.raised_by))))
        if raised <= move.t:
            return
        step = self.schedule.transition(move.t, raised)
        kept = float(self.schedule.alpha(raised)) / float(self.schedule.alpha(move.t))
        added = self.churn_noise * math.sqrt(float(step.forward_variance))
        move.x_t, move.t = kept * move.x_t + added * move.draw(), raised

    def _slope(self, x: Tensor, x0_hat: Tensor, t: float) -> Tensor:
        """d(x / c) / dq, see the class."""
        alpha, sigma, _ = self.level(t)
        epsilon = (x - alpha * x0_hat) / sigma
        return epsilon - x0_hat if self._bounded else epsilon

    def _scale(self, t: float) -> float:
        alpha, sigma, _ = self.level(t)
        return alpha + sigma if self._bounded else alpha

    def _euler(self, move: Move, slope: Tensor) -> Tensor:
        scale_t, scale_s = self._scale(move.t), self._scale(move.s)
        width = self.level(move.s).sigma / scale_s - self.level(move.t).sigma / scale_t
        return scale_s / scale_t * move.x_t + (scale_s * width) * slope


class HeunSampler(EulerSampler):
    """Heun's method: the slope is averaged with the one at the end of the step, at twice the price.

    The last step, to the clean image, is Euler's (algorithm 2, line 9).
    """

    @property
    def evaluations(self) -> int:
        return 2 * len(self.intervals) - 1

    def step(self, move: Move) -> Tensor:
        self._churn(move)
        if move.last:
            return move.x0_hat
        slope = self._slope(move.x_t, move.x0_hat, move.t)
        x_s = self._euler(move, slope)
        slope_s = self._slope(x_s, move.evaluate(x_s, move.s), move.s)
        return self._euler(move, 0.5 * (slope + slope_s))
