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
    images_to_network,
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


def noisy_images(process: GaussianProcess, images: np.ndarray, seed: int) -> bytes:
    """A PNG grid of what a classifier of noisy images is shown: images (N, H, W, C) uint8, one noisier than the other.

    In rows of 6 to 16, from the least noise at the top left to the most at the bottom right.
    """
    x0 = images_to_network(images)
    t = process.schedule.training_times(torch.linspace(0, 1, len(x0) + 1, dtype=torch.float64)[:-1])
    t = t[torch.argsort(process.schedule.log_snr(t), descending=True, stable=True)]  # some schedules fall from t_max
    noise = KeyedNoise(seed, torch.arange(len(x0)), "preview").initial(x0.shape[1:], x0.device)
    x_t = process.q_sample(x0, t, noise)
    shown = x_t / x_t.flatten(1).abs().amax(dim=1).clamp(min=1.0).reshape(-1, 1, 1, 1)
    return png(grid(images_from_network(shown), min(len(x0), max(6, min(16, math.isqrt(len(x0)))))))


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
