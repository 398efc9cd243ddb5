"""Sample grids: what the moving average draws now, always from the same noise."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffusion_core.diffusion import (
    Denoiser,
    GaussianProcess,
    KeyedNoise,
    SamplerConfig,
    build_sampler,
    images_from_network,
)

Shape = tuple[int, int, int]


def preview(
    network: nn.Module,
    process: GaussianProcess,
    image_shape: Shape,
    num_classes: int,
    *,
    count: int,
    steps: int,
    seed: int,
    device: torch.device,
) -> bytes:
    """A PNG grid of `count` images, labels in turn, drawn with DDIM in float32.

    Raises:
        ValueError: the network produces values that are not numbers.
    """
    height, width, channels = image_shape
    config = SamplerConfig(steps=steps)
    ids = torch.arange(count)
    cond = {"label": (ids % num_classes).to(device)} if num_classes else None
    noise = KeyedNoise(seed, ids, "preview")
    with torch.inference_mode():
        denoiser = Denoiser(process, network, cond, threshold=config)
        x_t = noise.initial((channels, height, width), device)
        x0 = build_sampler(config, process).sample(denoiser, x_t, noise)
    columns = min(num_classes, 16) if num_classes else math.ceil(math.sqrt(count))
    return png(grid(images_from_network(x0), min(columns, count)))


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 images (N, H, W, C) side by side, `columns` in a row, with a white line between them."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 1 or 3) uint8 as PNG; small ones enlarged by whole numbers so that they can be seen."""
    zoom = max(1, 256 // max(image.shape[:2]))
    large = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(large[..., 0] if large.shape[2] == 1 else large).save(buffer, "PNG")
    return buffer.getvalue()
