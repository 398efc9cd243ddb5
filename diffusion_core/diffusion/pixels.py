"""Between pixels and the numbers that a network sees: uint8 NHWC outside, float32 NCHW in [-1, 1] inside."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_uint8(x: Tensor) -> Tensor:
    """Pixels uint8 of `x` in [-1, 1] (any floating dtype and shape): clamped, then rounded half up.

    Raises:
        ValueError: if a value is not a number, which no pixel can show.
    """
    if torch.isnan(x).any():
        raise ValueError("an image contains values that are not numbers (NaN): the model has diverged")
    scaled = (x.clamp(-1.0, 1.0).to(torch.promote_types(x.dtype, torch.float32)) + 1.0) * 127.5
    return torch.floor(scaled + 0.5).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 pixels of any shape; the inverse of `to_uint8`."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def images_to_network(images: np.ndarray | Tensor, device: torch.device | str | None = None) -> Tensor:
    """uint8 images (N, H, W, C) as float32 (N, C, H, W) in [-1, 1]; the bytes travel to `device` as uint8.

    The result is a view in channels_last order: call `.contiguous()` for the plain one.
    """
    pixels = torch.from_numpy(np.require(images, requirements="W")) if isinstance(images, np.ndarray) else images
    return from_uint8(pixels.to(device)).permute(0, 3, 1, 2)


def images_from_network(x: Tensor) -> np.ndarray:
    """float (N, C, H, W) in [-1, 1] as uint8 images (N, H, W, C), contiguous, in host memory."""
    return np.ascontiguousarray(to_uint8(x).permute(0, 2, 3, 1).cpu().numpy())
