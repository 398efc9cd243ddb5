"""Noise schedules: x_t = alpha(t) * x0 + sigma(t) * epsilon, for real t.

A schedule is everything that a sampler knows of a process besides the denoiser. The discrete ones here are
variance-preserving (alpha**2 + sigma**2 = 1) and come from a table of betas; t counts 0 … T-1 as in the code of
Ho et al. 2020 (their paper counts 1 … T), and t = -1 is the clean image. A new kind of schedule is one subclass or one
table of betas, and one line in `_KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import ScheduleKind, Spacing

Time = Tensor | float | int

MAX_BETA = 0.999


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
    """

    t_clean: float

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Scale of the image at time t: float64, of the shape and on the device of t (0-d on the CPU for a number)."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Scale of the noise at time t: float64, of the shape and on the device of t (0-d on the CPU for a number)."""

    @abstractmethod
    def times(self, steps: int, spacing: Spacing = Spacing.TRAILING) -> list[float]:
        """The times of a sampler of that many steps: descending, `steps` of them, `t_clean` not included.

        Raises:
            UserError: if the schedule cannot be divided into that many steps.
        """

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha**2 / sigma**2) at time t, float64; infinite at the clean image."""
        return 2.0 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

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


class DiscreteSchedule(NoiseSchedule):
    """A variance-preserving schedule of T timesteps given by its betas.

    Between two timesteps log(alphas_cumprod) is linear in t, as in DPM-Solver (Lu et al. 2022, appendix D).

    Args:
        betas: (T,) variances of the forward steps, each in (0, 1). Kept in float64: in bfloat16 the first
            alphas_cumprod would round to 1, and the first timesteps would get no noise.

    Attributes:
        betas, alphas_cumprod: float64 tensors (T,) on the CPU.
    """

    t_clean = -1.0

    def __init__(self, betas: Tensor | np.ndarray) -> None:
        self.betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if self.betas.ndim != 1 or not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError("betas must be a row of numbers between 0 and 1, both excluded")
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self.timesteps = len(self.betas)
        # Entry i belongs to t = i - 1, so that the clean image is entry 0.
        self._log_table = torch.cat((torch.zeros(1, dtype=torch.float64), torch.log1p(-self.betas).cumsum(0)))
        self._tables: dict[torch.device, Tensor] = {self._log_table.device: self._log_table}

    def alpha(self, t: Time) -> Tensor:
        """sqrt(alphas_cumprod) at time t in [-1, T-1]."""
        return torch.exp(0.5 * self._log_alphas_cumprod(t))

    def sigma(self, t: Time) -> Tensor:
        """sqrt(1 - alphas_cumprod) at time t in [-1, T-1]."""
        return torch.sqrt(-torch.expm1(self._log_alphas_cumprod(t)))

    def log_snr(self, t: Time) -> Tensor:
        """log(alphas_cumprod / (1 - alphas_cumprod)) at time t in [-1, T-1]."""
        log_alphas_cumprod = self._log_alphas_cumprod(t)
        return log_alphas_cumprod - torch.log(-torch.expm1(log_alphas_cumprod))

    def times(self, steps: int, spacing: Spacing = Spacing.TRAILING) -> list[float]:
        """The visited timesteps, descending whole numbers in [0, T-1] (Lin et al. 2024, table 2, for the names).

        "trailing", the default, starts at T-1, where a trained model has seen pure noise, and leaves about T / steps
        timesteps for the last step to the clean image. A number of steps need not divide T.
        """
        total = self.timesteps
        if not 1 <= steps <= total:
            raise UserError(f"steps: {steps} is not accepted: a process of {total} timesteps takes from 1 to {total}.")
        at = np.arange(steps, dtype=np.float64)
        if spacing == Spacing.TRAILING:
            visited = np.round(total - at * total / steps) - 1
        elif spacing == Spacing.LEADING:
            visited = np.floor((steps - 1 - at) * total / steps)
        elif spacing == Spacing.LINSPACE:
            visited = np.round((total - 1) * (1.0 - at / max(steps - 1, 1)))
        else:
            raise UserError(f"spacing: {spacing!r} is not accepted: known are {', '.join(Spacing)}.")
        return [float(t) for t in visited]

    def _log_alphas_cumprod(self, t: Time) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)
        table = self._tables.get(t.device)
        if table is None:
            table = self._tables[t.device] = self._log_table.to(t.device)
        entry = t.double() + 1.0
        if not t.is_cuda and not bool(((entry >= 0) & (entry <= self.timesteps)).all()):
            raise ValueError(f"a time is outside of [-1, {self.timesteps - 1}]")
        below = entry.floor().clamp(0, self.timesteps - 1).long()
        start = table[below]
        return start + (entry - below) * (table[below + 1] - start)


def linear_betas(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Ho et al. 2020, section 4, given for T = 1000; scaled by 1000 / T, so that every T ends in the same noise."""
    return np.linspace(beta_start, beta_end, timesteps, dtype=np.float64) * (1000.0 / timesteps)


def quadratic_betas(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas whose square root is linear ("quad" in the code of Ho et al. 2020), scaled by 1000 / T."""
    roots = np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64)
    return roots**2 * (1000.0 / timesteps)


def sigmoid_betas(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas on a logistic curve over [-6, 6] (as in GeoDiff, Xu et al. 2022), scaled by 1000 / T."""
    curve = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, timesteps, dtype=np.float64)))
    return (curve * (beta_end - beta_start) + beta_start) * (1000.0 / timesteps)


def cosine_betas(timesteps: int, offset: float = 0.008) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17: alphas_cumprod follows cos((t/T + s) / (1 + s) * pi/2)**2, s = `offset`."""
    angle = (np.arange(timesteps + 1, dtype=np.float64) / timesteps + offset) / (1.0 + offset) * (math.pi / 2)
    signal = np.cos(angle) ** 2
    return 1.0 - signal[1:] / signal[:-1]


def _discrete(betas: Callable[..., np.ndarray], timesteps: int, **options: Any) -> DiscreteSchedule:
    """Clipping at 0.999 (Nichol & Dhariwal 2021, section 3.2) touches the last cosine beta, and few-step schedules."""
    return DiscreteSchedule(np.minimum(betas(timesteps, **options), MAX_BETA))


_KINDS: dict[ScheduleKind, Callable[..., NoiseSchedule]] = {
    ScheduleKind.LINEAR: partial(_discrete, linear_betas),
    ScheduleKind.COSINE: partial(_discrete, cosine_betas),
    ScheduleKind.QUADRATIC: partial(_discrete, quadratic_betas),
    ScheduleKind.SIGMOID: partial(_discrete, sigmoid_betas),
}


def make_schedule(kind: ScheduleKind | str, timesteps: int = 1000, **options: Any) -> NoiseSchedule:
    """A schedule by its name.

    Args:
        kind: one of `ScheduleKind`, or its value.
        timesteps: T of the discrete schedules.
        options: `beta_start` and `beta_end` (linear, quadratic, sigmoid; given for T = 1000), `offset` (cosine).

    Raises:
        UserError: if there is no such kind, or T is below 2.
    """
    if kind not in _KINDS:
        raise UserError(f"schedule: {str(kind)!r} is not accepted: known are {', '.join(_KINDS)}.")
    if timesteps < 2:
        raise UserError(f"timesteps: {timesteps} is not accepted: at least 2 are needed.")
    return _KINDS[ScheduleKind(kind)](timesteps, **options)
