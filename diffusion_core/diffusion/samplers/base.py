"""What all samplers share: the list of times, the loop over them, and the address of their noise.

A new sampler is one file with a subclass of `Sampler` that says how one `Move` is made, and one line in
`SamplerKind`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import SamplerConfig
from diffusion_core.diffusion.kinds import Spacing
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
    """What is shown after each step: step `index` of `steps` went from time t to x_s at time s, by way of x0_hat."""

    index: int
    steps: int
    t: float
    s: float
    x_s: Tensor
    x0_hat: Tensor


class Level(NamedTuple):
    """A schedule at one time, as numbers; `lam` = log(alpha / sigma), half of the log-SNR."""

    alpha: float
    sigma: float
    lam: float


class Move:
    """One step that is being made, from x_t at time t to time s.

    A sampler may move `x_t` and `t` before it asks for `x0_hat`: to more noise, or to a corrected image.

    Attributes:
        index, steps: step `index` of `steps`.
        t, s: the times; s is before t, and t_clean in the last step.
        x_t: (N, C, H, W).
        past: the moves before, newest first, as many as the sampler remembers.
    """

    def __init__(
        self,
        index: int,
        steps: int,
        interval: tuple[float, float],
        x_t: Tensor,
        denoiser: Denoise,
        noise: Noise | None = None,
        past: Sequence[Move] = (),
    ) -> None:
        self.index, self.steps, (self.t, self.s) = index, steps, interval
        self.x_t, self.past = x_t, past
        self._denoiser, self._noise, self._draws = denoiser, noise, 0
        self._x0_hat: Tensor | None = None
        self._fraction: Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether this step ends at the clean image."""
        return self.index == self.steps - 1

    @property
    def x0_hat(self) -> Tensor:
        """The denoiser's estimate at (x_t, t), asked for when it is first wanted."""
        if self._x0_hat is None:
            self._x0_hat = self.evaluate(self.x_t, self.t)
        return self._x0_hat

    @property
    def fraction(self) -> Tensor:
        """Where the learned variance lies (see `GaussianProcess.split`); asked for before `x0_hat`, it comes with it.

        Raises:
            ValueError: if the denoiser does not tell it.
        """
        if self._fraction is None:
            estimate = self._denoiser.estimate(self.x_t, self.t) if hasattr(self._denoiser, "estimate") else None
            if estimate is None or estimate.fraction is None:
                raise ValueError("this sampler needs a learned variance: pass a Denoiser of a process that has one")
            self._x0_hat, self._fraction = estimate
        assert self._fraction is not None
        return self._fraction

    def evaluate(self, x: Tensor, t: float) -> Tensor:
        """The denoiser's estimate of x0 anywhere else: one more evaluation."""
        return self._denoiser(x, t)

    def draw(self) -> Tensor:
        """Standard normal noise of the shape of x_t, new at each call."""
        if self._noise is None:
            raise ValueError("this sampler draws noise at its steps: pass a KeyedNoise as `noise`")
        x, self._draws = self.x_t, self._draws + 1
        return self._noise.normal(x.shape[1:], self.index, self._draws - 1, device=x.device, dtype=x.dtype)


class Sampler(ABC):
    """Takes noise to a clean image in a number of steps.

    Args:
        schedule: alpha(t) and sigma(t).
        steps: number of steps; from 1 to T, and it need not divide T.
        spacing, rho: which times are visited, see `NoiseSchedule.times`.
        times: the visited times themselves, descending and without the clean one, instead of a spacing.

    Attributes:
        intervals: (t, s) of each step.
        memory: how many moves before the present one a step needs.

    Raises:
        UserError: if the schedule does not take that many steps.
    """

    memory: ClassVar[int] = 0

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        spacing: Spacing | str = Spacing.TRAILING,
        times: Sequence[float] | None = None,
        rho: float = 7.0,
    ) -> None:
        self.schedule = schedule
        self.times = list(times) if times is not None else schedule.times(steps, spacing, rho)
        ends = [*self.times[1:], schedule.t_clean]
        if len(self.times) != steps or any(t <= s for t, s in zip(self.times, ends, strict=True)):
            raise UserError(f"times: {steps} descending times are needed, all of them above {schedule.t_clean}.")
        self.intervals = list(zip(self.times, ends, strict=True))
        self._levels: dict[float, Level] = {}

    @classmethod
    def from_config(cls, config: SamplerConfig, process: GaussianProcess) -> Self:
        """The sampler of a configuration, for a model that was trained with `process`."""
        return cls(process.schedule, config.steps, **config.options())

    @property
    def evaluations(self) -> int:
        """How often the denoiser is asked for one batch of images; under guidance it asks the network twice."""
        return len(self.intervals)

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
            x_T: (N, C, H, W) standard normal noise, as from `KeyedNoise.initial`, whatever the schedule: here, and
                nowhere else, it is brought to the scale that the schedule starts from.
            noise: source of the noise of the steps. A deterministic sampler never touches it and needs none.
            callback: called after every step.

        Returns:
            (N, C, H, W) in the dtype of x_T: the denoiser's estimate of the last step, so in [-1, 1] if it thresholds.
        """
        x = x_T
        for step in self.trajectory(denoiser, x_T, noise):
            x = step.x_s
            if callback is not None:
                callback(step)
        return x

    @torch.no_grad()
    def trajectory(self, denoiser: Denoise, x_T: Tensor, noise: Noise | None = None) -> Iterator[Step]:
        """The steps of `sample` one by one, each computed when it is asked for; the last one's x_s is its result."""
        scale = self.schedule.prior_scale(self.times[0])
        x, past = (x_T if scale == 1.0 else scale * x_T), deque[Move](maxlen=self.memory)
        for index, interval in enumerate(self.intervals):
            move = Move(index, len(self.intervals), interval, x, denoiser, noise, list(past))
            x = self.step(move)
            yield Step(index, move.steps, *interval, x, move.x0_hat)
            past.appendleft(move)
            move.past = ()  # or every move would keep all before it

    @abstractmethod
    def step(self, move: Move) -> Tensor:
        """x_s of a move. In the last one it is `move.x0_hat`, without noise."""

    def level(self, t: float) -> Level:
        """The schedule at time t; at the clean image `lam` is infinite, in pure noise it is minus infinity."""
        if t not in self._levels:  # the same few times for every batch
            alpha, sigma, log_snr = self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.log_snr(t)
            self._levels[t] = Level(float(alpha), float(sigma), 0.5 * float(log_snr))
        return self._levels[t]

    def ratio(self, t: float) -> float:
        """sigma / alpha at time t: the sigma of Karras et al. 2022."""
        return math.exp(-self.level(t).lam)
