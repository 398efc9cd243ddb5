"""One worker of a generation run, and the image set that it writes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusion_core.generation.config import GenerationConfig, ImageFormat, SamplingPrecision

if TYPE_CHECKING:
    from diffusion_core.generation.imageset import ImageSet, open_imageset
    from diffusion_core.generation.worker import Generator

_LAZY = {
    "Generator": "diffusion_core.generation.worker",
    "ImageSet": "diffusion_core.generation.imageset",
    "open_imageset": "diffusion_core.generation.imageset",
}

__all__ = ["GenerationConfig", "Generator", "ImageFormat", "ImageSet", "SamplingPrecision", "open_imageset"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
