"""Noise schedules: x_t = alpha(t) * x0 + sigma(t) * epsilon. One file per family, one line each in
`ScheduleKind`."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.diffusion.kinds import ScheduleKind
from diffusion_core.diffusion.schedules.base import NoiseSchedule, Time, Transition
from diffusion_core.diffusion.schedules.continuous import EDMSchedule, FlowSchedule, VESchedule, VPSchedule
from diffusion_core.diffusion.schedules.discrete import DiscreteSchedule, from_betas

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
    if kind not in set(ScheduleKind):
        raise UserError(f"schedule: {str(kind)!r} is not accepted: known are {', '.join(ScheduleKind)}.")
    if timesteps < 2:
        raise UserError(f"timesteps: {timesteps} is not accepted: at least 2 are needed.")
    kind = ScheduleKind(kind)
    make = partial(from_betas, kind.load(__name__)) if kind.is_discrete else kind.load(__name__)
    schedule: NoiseSchedule = make(timesteps, **options)
    return schedule
