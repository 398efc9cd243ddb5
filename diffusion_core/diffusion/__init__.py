"""The mathematics of diffusion: tensors in, tensors out; no files, no cluster, no global state.

One abstraction carries everything: a schedule gives x_t = alpha(t) * x0 + sigma(t) * epsilon, a denoiser gives an
estimate of x0 from (x_t, t), and a sampler sees nothing but these two. Names are imported on first use, so that a
configuration can be validated without loading torch.

The papers whose equations are named, by number as in their arXiv versions:

    Ho et al. 2020                2006.11239    Lu et al. 2022             2211.01095 (DPM-Solver: 2206.00927)
    Nichol & Dhariwal 2021        2102.09672    Zhao et al. 2023           2302.04867
    Song, Meng & Ermon 2020       2010.02502    Ho & Salimans 2022         2207.12598
    Song et al. 2021              2011.13456    Saharia et al. 2022        2205.11487
    Dhariwal & Nichol 2021        2105.05233    Lin et al. 2024            2305.08891
    Kingma et al. 2021            2107.00630    Kynkäänniemi et al. 2024   2404.07724
    Salimans & Ho 2022            2202.00512    Karras et al. 2024         2406.02507 (averages: 2312.02696)
    Karras et al. 2022            2206.00364    Hang et al. 2023           2303.09556
    Lipman et al. 2023            2210.02747    Choi et al. 2022           2204.00227
    Liu et al. 2023               2209.03003    Grathwohl et al. 2019      1810.01367
    Esser et al. 2024             2403.03206    Pan et al. 2023            2309.04907
    Rombach et al. 2022           2112.10752    Xu et al. 2022             2203.02923
    Peebles & Xie 2023            2212.09748    Theis et al. 2016          1511.01844
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
