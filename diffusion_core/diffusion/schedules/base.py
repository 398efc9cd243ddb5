"""What every noise schedule has: x_t = alpha(t) * x0 + sigma(t) * epsilon, for real t.

A schedule is everything that a sampler knows of a process besides the denoiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.kinds import Spacing

Time = Tensor | float | int


class Transition(NamedTuple):
    """q(x_s | x_t, x_0) for s before t, as float64 tensors of the broadcast shape of s and t.

    mean = x_t_coefficient * x_t + x0_coefficient * x_0, with the variance `posterior_variance`;
    `forward_variance` is that of q(x_t | x_s).
    """

    x_t_coefficient: Tensor
    x0_coefficient: Tensor
    posterior_variance: Tensor
    forward_variance: Tensor


class NoiseSchedule(ABC):
    """How much signal and how much noise x_t holds at time t.

    Attributes:
        t_clean: the time of the clean image, where alpha is 1 and sigma is 0.
        t_min, t_max: the least and the greatest time that a network is trained at and a sampler may visit.
        timesteps: T, the most steps that a sampler can take.
    """

    t_clean: float
    t_min: float
    t_max: float
    timesteps: int

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Scale of the image at time t: float64, of the shape and on the device of t (0-d on the CPU for a number)."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Scale of the noise at time t: float64, of the shape and on the device of t (0-d on the CPU for a number)."""

    @abstractmethod
    def time_of(self, log_snr: Time) -> Tensor:
        """The time at which the log-SNR is `log_snr`, float64: the inverse of `log_snr`, at most t_max."""

    @abstractmethod
    def training_times(self, uniform: Tensor) -> Tensor:
        """Times to train at from uniform variates in [0, 1), of their shape, each in [t_min, t_max]."""

    @abstractmethod
    def _even_times(self, steps: int, spacing: Spacing) -> np.ndarray:
        """The times of the spacings trailing, leading and linspace; see `Spacing`."""

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha**2 / sigma**2) at time t, float64; infinite at the clean image."""
        return 2.0 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether nothing is left of the image at t_max (zero terminal SNR)."""
        return float(self.alpha(self.t_max)) == 0.0

    def times(self, steps: int, spacing: Spacing | str = Spacing.TRAILING, rho: float = 7.0) -> list[float]:
        """The times of a sampler of that many steps: descending, `steps` of them, `t_clean` not included.

        Args:
            steps: from 1 to T; it need not divide T.
            spacing: which times (Lin et al. 2024, table 2, for the names). "trailing", the default, starts where a
                trained model has seen the most noise, and leaves about T / steps timesteps for the last step to the
                clean image.
            rho: of the spacing karras: sigma / alpha to the power 1 / rho falls evenly (Karras et al. 2022, eq. 5).

        Raises:
            UserError: if the schedule cannot be divided into that many steps, or in that way.
        """
        if not 1 <= steps <= self.timesteps:
            raise UserError(
                f"steps: {steps} is not accepted: a process of {self.timesteps} timesteps takes from 1 to "
                f"{self.timesteps}."
            )
        if spacing not in set(Spacing):
            raise UserError(f"spacing: {spacing!r} is not accepted: known are {', '.join(Spacing)}.")
        if spacing == Spacing.KARRAS:
            return self._karras_times(steps, rho)
        return [float(t) for t in self._even_times(steps, Spacing(spacing))]

    def network_time(self, t: Time) -> Time:
        """What a network is told of the time, of the shape of t; the time itself where there are timesteps."""
        return t

    def network_scale(self, t: Time) -> Tensor | None:
        """What x_t is multiplied by before a network sees it, float64 of the shape of t; None is 1."""
        return None

    def prior_scale(self, t: float) -> float:
        """Standard deviation of the noise that sampling starts from at time t."""
        return float(self.sigma(t))

    def transition(self, s: Time, t: Time) -> Transition:
        """The step from t back to s (Kingma et al. 2021, "Variational diffusion models", appendix A).

        In terms of the log-SNR the coefficients stay accurate where alpha and sigma hardly change, for s = t_clean, and
        for every schedule. With s = t-1 and betas this is eq. 6 and 7 of Ho et al. 2020.
        """
        alpha_s, variance_s, variance_t = self.alpha(s), self.sigma(s).square(), self.sigma(t).square()
        gained = -torch.expm1(self.log_snr(t) - self.log_snr(s))
        return Transition(
            x_t_coefficient=self.alpha(t) / alpha_s * variance_s / variance_t,
            x0_coefficient=alpha_s * gained,
            posterior_variance=variance_s * gained,
            forward_variance=variance_t * gained,
        )

    def _karras_times(self, steps: int, rho: float) -> list[float]:
        """Karras et al. 2022, eq. 5, without its last sigma, 0, and with sigma / alpha for sigma."""
        if self.ends_in_pure_noise:
            raise UserError(
                "spacing: karras is not accepted with a schedule that ends in pure noise, where sigma / alpha is "
                "infinite: choose trailing, leading or linspace."
            )
        if rho < 1.0:
            raise UserError(f"rho: {rho} is not accepted: it must be 1 or more.")
        least, greatest = (float(torch.exp(-0.5 * self.log_snr(t) / rho)) for t in (self.t_min, self.t_max))
        roots = greatest + np.linspace(0.0, 1.0, steps) * (least - greatest)
        visited = self.time_of(torch.from_numpy(-2.0 * rho * np.log(roots))).tolist()
        visited[0] = self.t_max
        return [*visited[:-1], self.t_min] if steps > 1 else visited
