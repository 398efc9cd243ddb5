"""Samplers: they see a denoiser and a schedule, and nothing else. One file per family, one line each in `_SAMPLERS`."""

from __future__ import annotations

from typing import Any

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import SamplerConfig, SamplerKind
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.samplers.ancestral import AncestralSampler
from diffusion_core.diffusion.samplers.base import Move, Noise, Sampler, Step
from diffusion_core.diffusion.samplers.ddim import DDIMSampler
from diffusion_core.diffusion.samplers.dpm_solver import DPMSolver2M, DPMSolver2MSDE, DPMSolver3M, DPMSolver3MSDE
from diffusion_core.diffusion.samplers.edm import EulerSampler, HeunSampler
from diffusion_core.diffusion.samplers.predictor_corrector import PredictorCorrectorSampler
from diffusion_core.diffusion.samplers.unipc import UniPCSampler
from diffusion_core.diffusion.schedules import NoiseSchedule

__all__ = ["AncestralSampler", "DDIMSampler", "Move", "Noise", "Sampler", "Step", "build_sampler", "make_sampler"]

_SAMPLERS: dict[SamplerKind, type[Sampler]] = {
    SamplerKind.DDPM: AncestralSampler,
    SamplerKind.DDIM: DDIMSampler,
    SamplerKind.EULER: EulerSampler,
    SamplerKind.HEUN: HeunSampler,
    SamplerKind.DPMPP_2M: DPMSolver2M,
    SamplerKind.DPMPP_3M: DPMSolver3M,
    SamplerKind.DPMPP_2M_SDE: DPMSolver2MSDE,
    SamplerKind.DPMPP_3M_SDE: DPMSolver3MSDE,
    SamplerKind.UNIPC: UniPCSampler,
    SamplerKind.PREDICTOR_CORRECTOR: PredictorCorrectorSampler,
}


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
    if kind not in _SAMPLERS:
        raise UserError(f"sampler.kind: {str(kind)!r} is not accepted: known are {', '.join(_SAMPLERS)}.")
    return _SAMPLERS[SamplerKind(kind)]
