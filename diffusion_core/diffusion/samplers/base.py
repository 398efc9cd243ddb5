"""What all samplers share: the list of times, the loop over them, and the address of their noise.

A new sampler is one file with a subclass of `Sampler`, and one line in the registry of this package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import SamplerConfig, Spacing
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.schedules import NoiseSchedule

Denoise = Callable[[Tensor, float], Tensor]


class Noise(Protocol):
    """Where the noise of the steps comes from; `KeyedNoise` is one."""

    def normal(
        self,
        shape: Sequence[int],
        step: int,
        draw: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype = ...,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """What a callback is shown after each step: step `index` of `steps` went from x_t at time t to x_s at time s."""

    index: int
    steps: int
    t: float
    s: float
    x_s: Tensor
    x0_hat: Tensor


class Sampler(ABC):
    """Takes x_T to a clean image in a number of steps, each of which asks the denoiser once.

    Args:
        schedule: alpha(t) and sigma(t).
        steps: number of steps; with a discrete schedule from 1 to T, and it need not divide T.
        spacing: which times are visited, see `NoiseSchedule.times`.
        times: the visited times themselves, descending and without the clean one, instead of a spacing.

    Raises:
        UserError: if the schedule does not take that many steps.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        spacing: Spacing | str = Spacing.TRAILING,
        times: Sequence[float] | None = None,
    ) -> None:
        self.schedule = schedule
        self.times = list(times) if times is not None else schedule.times(steps, Spacing(spacing))
        ends = [*self.times[1:], schedule.t_clean]
        if len(self.times) != steps or any(t <= s for t, s in zip(self.times, ends, strict=True)):
            raise UserError(f"times: {steps} descending times are needed, all of them above {schedule.t_clean}.")
        self.intervals = list(zip(self.times, ends, strict=True))

    @classmethod
    def from_config(cls, config: SamplerConfig, process: GaussianProcess) -> Sampler:
        """The sampler of a configuration, for a model that was trained with `process`."""
        return cls(process.schedule, config.steps, config.spacing)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoise,
        x_T: Tensor,
        noise: Noise | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Clean images from noise.

        Args:
            denoiser: (x_t, t) -> x0_hat.
            x_T: (N, C, H, W) standard normal noise, as from `KeyedNoise.initial`.
            noise: source of the noise of the steps. A deterministic sampler never touches it and needs none.
            callback: called after every step.

        Returns:
            (N, C, H, W) in the dtype of x_T: the denoiser's estimate of the last step, so in [-1, 1] if it thresholds.
        """
        x = x_T
        for index, (t, s) in enumerate(self.intervals):
            x0_hat = denoiser(x, t)
            x = self.step(x, x0_hat, t, s, _Draw(noise, x, index))
            if callback is not None:
                callback(Step(index, len(self.intervals), t, s, x, x0_hat))
        return x

    @abstractmethod
    def step(self, x_t: Tensor, x0_hat: Tensor, t: float, s: float, draw: Callable[[], Tensor]) -> Tensor:
        """x_s from x_t and the estimate of x0; `draw()` gives standard normal noise of the shape of x_t."""


class _Draw:
    """Noise of one step, drawn only when called."""

    def __init__(self, noise: Noise | None, like: Tensor, step: int) -> None:
        self.noise, self.like, self.step, self.draws = noise, like, step, 0

    def __call__(self) -> Tensor:
        if self.noise is None:
            raise ValueError("this sampler draws noise at its steps: pass a KeyedNoise as `noise`")
        like = self.like
        self.draws += 1
        return self.noise.normal(like.shape[1:], self.step, self.draws - 1, device=like.device, dtype=like.dtype)
