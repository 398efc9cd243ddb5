"""Noise schedules: x_t = alpha(t) * x0 + sigma(t) * epsilon. One file per family, one line each in `_SCHEDULES`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import ScheduleKind
from diffusion_core.diffusion.schedules.base import NoiseSchedule, Time, Transition
from diffusion_core.diffusion.schedules.continuous import EDMSchedule, FlowSchedule, VESchedule, VPSchedule
from diffusion_core.diffusion.schedules.discrete import (
    DiscreteSchedule,
    cosine_betas,
    from_betas,
    linear_betas,
    quadratic_betas,
    scaled_linear_betas,
    sigmoid_betas,
)

__all__ = [
    "DiscreteSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "Time",
    "Transition",
    "VESchedule",
    "VPSchedule",
    "make_schedule",
]

_SCHEDULES: dict[ScheduleKind, Callable[..., NoiseSchedule]] = {
    ScheduleKind.LINEAR: partial(from_betas, linear_betas),
    ScheduleKind.SCALED_LINEAR: partial(from_betas, scaled_linear_betas),
    ScheduleKind.COSINE: partial(from_betas, cosine_betas),
    ScheduleKind.QUADRATIC: partial(from_betas, quadratic_betas),
    ScheduleKind.SIGMOID: partial(from_betas, sigmoid_betas),
    ScheduleKind.VP: VPSchedule,
    ScheduleKind.VE: VESchedule,
    ScheduleKind.EDM: EDMSchedule,
    ScheduleKind.FLOW: FlowSchedule,
}


def make_schedule(kind: ScheduleKind | str, timesteps: int = 1000, **options: Any) -> NoiseSchedule:
    """A schedule by its name.

    Args:
        kind: one of `ScheduleKind`, or its value.
        timesteps: T of the discrete schedules; in continuous time the finest division, see `ContinuousSchedule`.
        options: `beta_start` and `beta_end` (linear, scaled_linear, quadratic, sigmoid; given for T = 1000), `offset`
            (cosine), `rescale_zero_terminal_snr` (all discrete ones); `beta_min` and `beta_max` (vp); `sigma_min` and
            `sigma_max` (ve, edm); `log_mean` and `log_std` of the noise levels in training (edm).

    Raises:
        UserError: if there is no such kind, or T is below 2.
    """
    if kind not in _SCHEDULES:
        raise UserError(f"schedule: {str(kind)!r} is not accepted: known are {', '.join(_SCHEDULES)}.")
    if timesteps < 2:
        raise UserError(f"timesteps: {timesteps} is not accepted: at least 2 are needed.")
    return _SCHEDULES[ScheduleKind(kind)](timesteps, **options)
