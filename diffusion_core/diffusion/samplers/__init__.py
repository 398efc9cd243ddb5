"""Samplers: they see a denoiser and a schedule, and nothing else. One file per family, one line each in
`SamplerKind`."""

from __future__ import annotations

from typing import Any

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import SamplerConfig
from diffusion_core.diffusion.kinds import SamplerKind
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.samplers.ancestral import AncestralSampler
from diffusion_core.diffusion.samplers.base import Move, Noise, Sampler, Step
from diffusion_core.diffusion.samplers.ddim import DDIMSampler
from diffusion_core.diffusion.schedules import NoiseSchedule

__all__ = ["AncestralSampler", "DDIMSampler", "Move", "Noise", "Sampler", "Step", "build_sampler", "make_sampler"]


def make_sampler(kind: SamplerKind | str, schedule: NoiseSchedule, steps: int, **options: Any) -> Sampler:
    """A sampler by its name.

    Args:
        kind: one of `SamplerKind`, or its value.
        schedule: that of the process which the model was trained with.
        steps: number of steps.
        options: `spacing` and `rho`, or `times`, for all; further ones as the class of the kind documents them, as
            `variance` for ddpm and `eta` for ddim.

    Raises:
        UserError: if there is no such kind, or the schedule does not take that many steps.
    """
    return _sampler(kind)(schedule, steps, **options)


def build_sampler(config: SamplerConfig, process: GaussianProcess) -> Sampler:
    """The sampler of a configuration, with everything that it takes from the process (as the ancestral variance).

    Raises:
        UserError: if the schedule does not take that many steps.
    """
    return _sampler(config.kind).from_config(config, process)


def _sampler(kind: SamplerKind | str) -> type[Sampler]:
    if kind not in set(SamplerKind):
        raise UserError(f"sampler.kind: {str(kind)!r} is not accepted: known are {', '.join(SamplerKind)}.")
    found: type[Sampler] = SamplerKind(kind).load(__name__)
    return found
