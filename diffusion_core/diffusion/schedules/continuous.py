"""Schedules in continuous time: the SDEs of Song et al. 2021, the noise levels of Karras et al. 2022, flow matching."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from diffusion_core.diffusion.kinds import Spacing
from diffusion_core.diffusion.schedules.base import NoiseSchedule, Time


class ContinuousSchedule(NoiseSchedule):
    """Time from 0, the clean image, to `t_max`.

    Networks are trained and samplers stop at t_min > 0, from where the last step goes to the clean image: there the
    score is unbounded (Song et al. 2021, appendix C). It is 1 / T of the whole, so that the spacings visit the places
    that they visit with T timesteps.

    Args:
        timesteps: T, the finest division of time.
    """

    t_clean = 0.0
    latest = 1.0  # the greatest time that alpha and sigma are defined for

    def __init__(self, timesteps: int = 1000) -> None:
        self.timesteps = timesteps
        self.t_min, self.t_max = 1.0 / timesteps, 1.0

    def training_times(self, uniform: Tensor) -> Tensor:
        """Times float64 in (t_min, t_max], uniformly distributed."""
        return self.t_max - uniform.double() * (self.t_max - self.t_min)

    def network_time(self, t: Time) -> Time:
        """1000 t, which suits networks that were made for a thousand timesteps."""
        return t.double() * 1000.0 if isinstance(t, Tensor) else t * 1000.0

    def time_of(self, log_snr: Time) -> Tensor:
        """The time in [0, t_max] with that log-SNR."""
        return self._inverse(torch.as_tensor(log_snr, dtype=torch.float64)).clamp(0.0, self.t_max)

    @abstractmethod
    def _inverse(self, log_snr: Tensor) -> Tensor:
        """The time of a log-SNR, of any size."""

    def _place(self, share: np.ndarray) -> np.ndarray:
        """Times at shares in [1 / T, 1] of the whole."""
        return share * self.t_max

    def _even_times(self, steps: int, spacing: Spacing) -> np.ndarray:
        at, least = np.arange(steps, dtype=np.float64), 1.0 / self.timesteps
        if spacing is Spacing.TRAILING:
            return self._place(1.0 - at / steps)
        if spacing is Spacing.LEADING:
            return self._place((steps - 1 - at) / steps + least)
        return self._place(1.0 - at / max(steps - 1, 1) * (1.0 - least))

    def _checked(self, t: Time) -> Tensor:
        t = t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        if not t.is_cuda and not bool(((t >= 0) & (t <= self.latest)).all()):
            raise ValueError(f"a time is outside of [0, {self.latest}]")
        return t


class VPSchedule(ContinuousSchedule):
    """The variance-preserving SDE, beta(t) = beta_min + t * (beta_max - beta_min) (Song et al. 2021, eq. 11 and 32).

    alpha(t)**2 = exp(-B(t)), B the integral of beta (eq. 33): the linear schedule with infinitely many timesteps.
    """

    def __init__(self, timesteps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__(timesteps)
        self.beta_min, self.beta_max = beta_min, beta_max

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Time) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def log_snr(self, t: Time) -> Tensor:
        return -torch.log(torch.expm1(self._integral(t)))

    def prior_scale(self, t: float) -> float:
        """1: the variance of x_t is 1 at all times, if that of the images is."""
        return 1.0

    def _integral(self, t: Time) -> Tensor:
        t = self._checked(t)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()

    def _inverse(self, log_snr: Tensor) -> Tensor:
        integral = torch.nn.functional.softplus(-log_snr, threshold=700.0).clamp(max=float(self._integral(self.t_max)))
        slope = self.beta_max - self.beta_min
        return 2.0 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * slope * integral))


class _ExplodingSchedule(ContinuousSchedule):
    """The image keeps its scale and the noise grows: alpha = 1. Networks see x_t at unit variance."""

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(self._checked(t))

    def log_snr(self, t: Time) -> Tensor:
        return -2.0 * torch.log(self.sigma(t))

    def network_scale(self, t: Time) -> Tensor:
        """1 / sqrt(1 + sigma**2): c_in of Karras et al. 2022, table 1, for images of unit variance."""
        return torch.rsqrt(1.0 + self.sigma(t).square())


class VESchedule(_ExplodingSchedule):
    """The variance-exploding SDE, sigma(t) = sigma_min * (sigma_max / sigma_min)**t (Song et al. 2021, eq. 9 and 31).

    sigma(0) is 0, a jump from sigma_min, as in their appendix C.
    """

    def __init__(self, timesteps: int = 1000, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__(timesteps)
        self.log_min, self.log_ratio = math.log(sigma_min), math.log(sigma_max / sigma_min)

    def sigma(self, t: Time) -> Tensor:
        t = self._checked(t)
        return torch.where(t > 0.0, torch.exp(self.log_min + self.log_ratio * t), 0.0)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - self.log_min) / self.log_ratio


class EDMSchedule(_ExplodingSchedule):
    """Time is the noise level: sigma(t) = t (Karras et al. 2022, section 4).

    Noise levels for training are drawn log-normally (their table 1). The spacings other than karras divide
    sigma**(1/7) evenly, which is the spacing karras at its default rho, by other rules for the ends.

    Args:
        timesteps: the most steps of a sampler.
        log_mean, log_std: mean and standard deviation of log(sigma) in training, P_mean and P_std of the paper.
    """

    latest = math.inf

    def __init__(
        self,
        timesteps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        log_mean: float = -1.2,
        log_std: float = 1.2,
    ) -> None:
        super().__init__(timesteps)
        self.t_min, self.t_max = sigma_min, sigma_max
        self.log_mean, self.log_std = log_mean, log_std

    def sigma(self, t: Time) -> Tensor:
        return self._checked(t).clone()

    def network_time(self, t: Time) -> Time:
        """c_noise = log(sigma) / 4 (table 1)."""
        return torch.log(t.double()) / 4.0 if isinstance(t, Tensor) else math.log(t) / 4.0

    def training_times(self, uniform: Tensor) -> Tensor:
        """Noise levels float64, log-normal, moved to [sigma_min, sigma_max] where they are outside."""
        normal = torch.special.ndtri(uniform.double())
        return torch.exp(self.log_mean + self.log_std * normal).clamp(self.t_min, self.t_max)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr)

    def _place(self, share: np.ndarray) -> np.ndarray:
        least, greatest = self.t_min ** (1 / 7), self.t_max ** (1 / 7)
        first = 1.0 / self.timesteps
        placed = (least + (share - first) / (1.0 - first) * (greatest - least)) ** 7
        return np.where(share == 1.0, self.t_max, placed)


class FlowSchedule(ContinuousSchedule):
    """Straight lines: alpha = 1 - t, sigma = t (Lipman et al. 2023, eq. 20 with sigma_min = 0; Liu et al. 2023).

    Time runs from the image to the noise, against the first and as in Esser et al. 2024. Nothing is left of the image
    at t = 1, so the noise alone cannot be predicted.
    """

    def alpha(self, t: Time) -> Tensor:
        return 1.0 - self._checked(t)

    def sigma(self, t: Time) -> Tensor:
        return self._checked(t).clone()

    def _inverse(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)
