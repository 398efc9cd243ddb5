"""Torch modules that predict: `build_network` makes one from its configuration. Imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusion_core.networks.config import (
    DiTConfig,
    NetworkConfig,
    NoisyClassifierConfig,
    UNetConfig,
    check_image_size,
)

if TYPE_CHECKING:
    from diffusion_core.networks.build import build_network
    from diffusion_core.networks.classifier import NoisyClassifier
    from diffusion_core.networks.dit import DiT
    from diffusion_core.networks.unet import UNet

_HOME = {"DiT": "dit", "NoisyClassifier": "classifier", "UNet": "unet", "build_network": "build"}

__all__ = [
    "DiT",
    "DiTConfig",
    "NetworkConfig",
    "NoisyClassifier",
    "NoisyClassifierConfig",
    "UNet",
    "UNetConfig",
    "build_network",
    "check_image_size",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
