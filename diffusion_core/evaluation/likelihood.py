"""How likely held-out images are under a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.bundle import Bundle
from diffusion_core.data.shards import ImageDataset
from diffusion_core.diffusion import (
    Denoiser,
    KeyedNoise,
    dequantised,
    images_to_network,
    log_likelihood,
    timestep_rms,
    variational_bound,
)
from diffusion_core.evaluation.config import LikelihoodConfig, LikelihoodMethod
from diffusion_core.evaluation.held_out import HeldOut, held_out_batches

IMPORTANCE_RANGES = 10


@dataclass(frozen=True)
class HeldOutLikelihood:
    """Mean and standard error of bits per dimension, and the table of importance that a bound of all timesteps gives
    (see `timestep_rms`)."""

    bits_per_dim: float
    error: float
    importance: tuple[float, ...] | None


def held_out_likelihood(
    bundle: Bundle, dataset: ImageDataset, config: LikelihoodConfig, batch_size: int, seed: int
) -> HeldOutLikelihood:
    """Bits per dimension of the first images of the test split, each with its own label and without guidance.

    Args:
        bundle: the model, on the device to compute on.
        batch_size: images at a time; the noise of an image depends on its place in the split alone.
    """
    bits: list[Tensor] = []
    squares: list[Tensor] = []  # of the bound's terms, summed over the images of a batch
    for batch in held_out_batches(bundle, dataset, config.images, batch_size, "likelihood of held-out images"):
        noise = KeyedNoise(seed, batch.places, "likelihood")
        if config.method is LikelihoodMethod.EXACT:
            bits.append(_exact(bundle, batch, noise, config))
        else:
            total, steps = _bound(bundle, batch, noise, config)
            bits.append(total)
            squares.append(steps.double().square().sum(dim=0).cpu())
    every = torch.cat(bits).double()
    error = float(every.std()) / math.sqrt(len(every)) if len(every) > 1 else 0.0
    table = None
    timesteps = bundle.config.process.timesteps
    if squares and config.steps == timesteps >= IMPORTANCE_RANGES:
        rms = (torch.stack(squares).sum(dim=0) / len(every)).sqrt()
        table = timestep_rms(rms[None], IMPORTANCE_RANGES)
    return HeldOutLikelihood(float(every.mean()), error, table)


def _exact(bundle: Bundle, batch: HeldOut, noise: KeyedNoise, config: LikelihoodConfig) -> Tensor:
    denoiser = Denoiser(bundle.process, bundle.network, batch.cond)
    points = dequantised(batch.pixels, noise)
    return log_likelihood(
        bundle.process.schedule, denoiser, points, noise, config.steps, config.probes
    ).bits_per_dim.cpu()


def _bound(bundle: Bundle, batch: HeldOut, noise: KeyedNoise, config: LikelihoodConfig) -> tuple[Tensor, Tensor]:
    # Images are in [-1, 1], and so is the better estimate; it is how the default sampler clamps too.
    denoiser = Denoiser(bundle.process, bundle.network, batch.cond, threshold="static")
    x0 = images_to_network(batch.pixels.cpu().numpy(), batch.pixels.device).contiguous()
    found = variational_bound(bundle.process, denoiser, x0, noise, config.steps)
    return found.total.cpu(), found.steps
