"""How well held-out images come back out of the noise that a model finds for them (DDIM inversion)."""

from __future__ import annotations

import math

from diffusion_core.bundle import Bundle
from diffusion_core.data.shards import ImageDataset
from diffusion_core.diffusion import Denoiser, images_to_network
from diffusion_core.diffusion.samplers import DDIMSampler
from diffusion_core.evaluation.config import InversionConfig
from diffusion_core.evaluation.held_out import held_out_batches


def inversion_error(bundle: Bundle, dataset: ImageDataset, config: InversionConfig, batch_size: int) -> float:
    """Root mean square difference, in grey levels of 0 to 255, between images and what DDIM makes of their noise.

    The first images of the test split, each with its own label and without guidance; the smaller the error, the better
    an image can be changed by way of its noise (Song, Meng & Ermon 2020, section 5.4).

    Args:
        bundle: the model, on the device to compute on.
        batch_size: images at a time.
    """
    sampler, squares, values = DDIMSampler(bundle.process.schedule, config.steps), 0.0, 0
    for batch in held_out_batches(bundle, dataset, config.images, batch_size, "inversion of held-out images"):
        # Both ways as the default sampler: unlimited, the least error in nearly pure noise grows beyond all bounds.
        denoiser = Denoiser(bundle.process, bundle.network, batch.cond, threshold="static")
        x0 = images_to_network(batch.pixels.cpu().numpy(), batch.pixels.device).contiguous()
        x_T = sampler.invert(denoiser, x0, config.iterations)
        difference = 127.5 * (sampler.sample(denoiser, x_T).clamp(-1.0, 1.0) - x0)
        squares, values = squares + float(difference.double().square().sum()), values + difference.numel()
    return math.sqrt(squares / values)
