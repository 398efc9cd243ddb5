"""The mathematics of diffusion: tensors in, tensors out; no files, no cluster, no global state.

One abstraction carries everything: a schedule gives x_t = alpha(t) * x0 + sigma(t) * epsilon, a denoiser gives an
estimate of x0 from (x_t, t), and a sampler sees nothing but these two. Names are imported on first use, so that a
configuration can be validated without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_core.diffusion.config import GuidanceConfig, ProcessConfig, SamplerConfig
    from diffusion_core.diffusion.denoiser import Denoiser
    from diffusion_core.diffusion.kinds import Prediction, SamplerKind, ScheduleKind, Spacing, Threshold, Variance
    from diffusion_core.diffusion.likelihood import dequantised, log_likelihood, timestep_rms, variational_bound
    from diffusion_core.diffusion.noise import (
        KeyedNoise,
        keyed_integers,
        keyed_normal,
        keyed_permutation,
        keyed_uniform,
    )
    from diffusion_core.diffusion.objective import Objective, training_times
    from diffusion_core.diffusion.objective_config import LossKind, ObjectiveConfig, TimeDraw, Weighting
    from diffusion_core.diffusion.pixels import from_uint8, images_from_network, images_to_network, to_uint8
    from diffusion_core.diffusion.process import GaussianProcess, make_process
    from diffusion_core.diffusion.samplers import build_sampler, make_sampler
    from diffusion_core.diffusion.schedules import DiscreteSchedule, NoiseSchedule, make_schedule

_HOME = {
    "config": ("GuidanceConfig", "ProcessConfig", "SamplerConfig"),
    "denoiser": ("Denoiser",),
    "kinds": ("Prediction", "SamplerKind", "ScheduleKind", "Spacing", "Threshold", "Variance"),
    "likelihood": ("dequantised", "log_likelihood", "timestep_rms", "variational_bound"),
    "noise": ("KeyedNoise", "keyed_integers", "keyed_normal", "keyed_permutation", "keyed_uniform"),
    "objective": ("Objective", "training_times"),
    "objective_config": ("LossKind", "ObjectiveConfig", "TimeDraw", "Weighting"),
    "pixels": ("from_uint8", "images_from_network", "images_to_network", "to_uint8"),
    "process": ("GaussianProcess", "make_process"),
    "samplers": ("build_sampler", "make_sampler"),
    "schedules": ("DiscreteSchedule", "NoiseSchedule", "make_schedule"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Denoiser",
    "DiscreteSchedule",
    "GaussianProcess",
    "GuidanceConfig",
    "KeyedNoise",
    "LossKind",
    "NoiseSchedule",
    "Objective",
    "ObjectiveConfig",
    "Prediction",
    "ProcessConfig",
    "SamplerConfig",
    "SamplerKind",
    "ScheduleKind",
    "Spacing",
    "Threshold",
    "TimeDraw",
    "Variance",
    "Weighting",
    "build_sampler",
    "dequantised",
    "from_uint8",
    "images_from_network",
    "images_to_network",
    "keyed_integers",
    "keyed_normal",
    "keyed_permutation",
    "keyed_uniform",
    "log_likelihood",
    "make_process",
    "make_sampler",
    "make_schedule",
    "timestep_rms",
    "to_uint8",
    "training_times",
    "variational_bound",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
