"""How likely held-out images are under a model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffusion_core.bundle import Bundle
from diffusion_core.data.shards import ImageDataset
from diffusion_core.diffusion import Denoiser, KeyedNoise, dequantised, images_to_network, log_likelihood
from diffusion_core.diffusion import variational_bound as bound
from diffusion_core.evaluation.classifier import blocks
from diffusion_core.evaluation.config import LikelihoodConfig, LikelihoodMethod
from diffusion_core.progress import Progress


def held_out_bits(bundle: Bundle, dataset: ImageDataset, config: LikelihoodConfig, batch_size: int, seed: int) -> float:
    """Mean bits per dimension of the first images of the test split, each with its own label and without guidance.

    Args:
        bundle: the model, on the device to compute on.
        batch_size: images at a time; the noise of an image depends on its place in the split alone.
    """
    count, place, bits = min(config.images, dataset.num_rows("test")), 0, 0.0
    with Progress("likelihood of held-out images", count) as progress:
        for block in blocks(dataset, "test", count):
            for first in range(0, len(block.images), batch_size):
                rows = slice(first, first + batch_size)
                labels = block.labels[rows] if block.labels is not None and bundle.config.class_names else None
                images = block.images[rows]
                noise = KeyedNoise(seed, torch.arange(place, place + len(images)), "likelihood")
                bits += float(_bits(bundle, images, labels, noise, config).double().sum())
                place += len(images)
                progress.advance(len(images))
    return bits / count


def _bits(
    bundle: Bundle, images: np.ndarray, labels: np.ndarray | None, noise: KeyedNoise, config: LikelihoodConfig
) -> Tensor:
    device = next(bundle.network.parameters()).device
    cond = None if labels is None else {"label": torch.from_numpy(labels).long().to(device)}
    if config.method is LikelihoodMethod.EXACT:
        points = dequantised(torch.from_numpy(np.ascontiguousarray(images)).to(device), noise)
        denoiser = Denoiser(bundle.process, bundle.network, cond)
        found = log_likelihood(bundle.process.schedule, denoiser, points, noise, config.steps, config.probes)
        return found.bits_per_dim
    # Images are in [-1, 1], and so is the better estimate; it is how the default sampler clamps too.
    denoiser = Denoiser(bundle.process, bundle.network, cond, threshold="static")
    x0 = images_to_network(np.ascontiguousarray(images), device).contiguous()
    return bound(bundle.process, denoiser, x0, noise, config.steps).total
