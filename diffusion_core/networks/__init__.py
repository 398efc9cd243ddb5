"""Torch modules that predict: `build_network` makes one from its configuration. Imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusion_core.networks.config import UNetConfig, check_image_size

if TYPE_CHECKING:
    from diffusion_core.networks.unet import UNet, build_network

__all__ = ["UNet", "UNetConfig", "build_network", "check_image_size"]


def __getattr__(name: str) -> Any:
    if name not in ("UNet", "build_network"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffusion_core.networks import unet

    value = getattr(unet, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
