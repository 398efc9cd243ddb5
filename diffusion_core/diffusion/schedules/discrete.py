"""Schedules of T timesteps, given by a table of betas (Ho et al. 2020).

They are variance-preserving (alpha**2 + sigma**2 = 1); t counts 0 … T-1 as in the code of Ho et al. (their paper counts
1 … T), and t = -1 is the clean image. A new one is a function to betas and one line in `ScheduleKind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.diffusion.kinds import Spacing
from diffusion_core.diffusion.schedules.base import NoiseSchedule, Time

MAX_BETA = 0.999


class DiscreteSchedule(NoiseSchedule):
    """A variance-preserving schedule of T timesteps given by its betas.

    Between two timesteps log(alphas_cumprod) is linear in t, as in DPM-Solver (Lu et al. 2022, appendix D).

    Args:
        betas: (T,) variances of the forward steps, each in (0, 1). Kept in float64: in bfloat16 the first
            alphas_cumprod would round to 1, and the first timesteps would get no noise. The last one may be 1: zero
            terminal SNR. Between the last two timesteps alpha is linear in t then.

    Attributes:
        betas, alphas_cumprod: float64 tensors (T,) on the CPU.
    """

    t_clean, t_min = -1.0, 0.0

    def __init__(self, betas: Tensor | np.ndarray) -> None:
        self.betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if self.betas.ndim != 1 or not bool(((self.betas > 0) & (self.betas <= 1)).all()) or 1.0 in self.betas[:-1]:
            raise ValueError("betas must be a row of numbers between 0 and 1, both excluded but for a last one of 1")
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self.timesteps = len(self.betas)
        self.t_max = self.timesteps - 1.0
        self._ends_in_pure_noise = bool(self.betas[-1] == 1.0)
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

    def time_of(self, log_snr: Time) -> Tensor:
        """The real time in [-1, T-1] with that log-SNR."""
        log_alphas_cumprod = torch.nn.functional.logsigmoid(torch.as_tensor(log_snr, dtype=torch.float64))
        table = self._table_on(log_alphas_cumprod.device)
        # searchsorted wants rising values: entry `below` is the last that is not smaller.
        below = torch.searchsorted(-table, -log_alphas_cumprod, right=True) - 1
        below = below.clamp(0, self.timesteps - 1)
        start, end = table[below], table[below + 1]
        linear = (log_alphas_cumprod - start) / (end - start)
        share = torch.where(torch.isinf(end), -torch.expm1(0.5 * (log_alphas_cumprod - start)), linear)
        return (below + share).clamp(0, self.timesteps) - 1.0

    def training_times(self, uniform: Tensor) -> Tensor:
        """Timesteps int64 in [0, T-1], all equally likely but for a bias below T * 2**-53."""
        return (uniform * self.timesteps).floor().long().clamp_(max=self.timesteps - 1)

    def prior_scale(self, t: float) -> float:
        """1: the variance of x_t is 1 at all times, if that of the images is."""
        return 1.0

    def _even_times(self, steps: int, spacing: Spacing) -> np.ndarray:
        """Descending whole numbers in [0, T-1]."""
        total, at = self.timesteps, np.arange(steps, dtype=np.float64)
        if spacing is Spacing.TRAILING:
            return np.asarray(np.round(total - at * total / steps) - 1)
        if spacing is Spacing.LEADING:
            return np.asarray(np.floor((steps - 1 - at) * total / steps))
        return np.asarray(np.round((total - 1) * (1.0 - at / max(steps - 1, 1))))

    def _table_on(self, device: torch.device) -> Tensor:
        table = self._tables.get(device)
        if table is None:
            table = self._tables[device] = self._log_table.to(device)
        return table

    def _log_alphas_cumprod(self, t: Time) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)
        table = self._table_on(t.device)
        entry = t.double() + 1.0
        if not t.is_cuda and not bool(((entry >= 0) & (entry <= self.timesteps)).all()):
            raise ValueError(f"a time is outside of [-1, {self.timesteps - 1}]")
        below = entry.floor().clamp(0, self.timesteps - 1).long()
        start, share = table[below], entry - below
        if not self.ends_in_pure_noise:
            return start + share * (table[below + 1] - start)
        end = table[below + 1]
        return start + torch.where(torch.isinf(end), 2.0 * torch.log1p(-share), share * (end - start))

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether the last beta is 1."""
        return self._ends_in_pure_noise


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


def scaled_linear_betas(timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> np.ndarray:
    """The quadratic betas with the bounds of latent diffusion (Rombach et al. 2022; "linear" in their code)."""
    return quadratic_betas(timesteps, beta_start, beta_end)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last alphas_cumprod is 0 and whose first is unchanged (Lin et al. 2024, algorithm 1).

    sqrt(alphas_cumprod) is shifted and scaled.
    """
    alpha = np.sqrt(np.cumprod(1.0 - betas))
    alphas_cumprod = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
    return np.concatenate((betas[:1], 1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]))


def from_betas(
    table: Callable[..., np.ndarray], timesteps: int, rescale_zero_terminal_snr: bool = False, **options: Any
) -> DiscreteSchedule:
    """The schedule of a table of betas.

    Clipping at 0.999 (Nichol & Dhariwal 2021, section 3.2) touches the last cosine beta, and few-step schedules.
    """
    betas = np.minimum(table(timesteps, **options), MAX_BETA)
    return DiscreteSchedule(zero_terminal_snr(betas) if rescale_zero_terminal_snr else betas)
