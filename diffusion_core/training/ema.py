"""The moving average of the weights, which is what a finished model consists of."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffusion_core.training.config import TrainingConfig


class Ema:
    """An exponential moving average in float32, with its half-life in images (Karras et al. 2022, appendix F.2).

    After each optimizer step, and only then: average <- decay * average + (1 - decay) * weights, where
    decay = 0.5 ** (batch_size / half-life), and the half-life is at most `ema_rampup_ratio` times the images seen, so
    that the random start is forgotten early. The state is the average alone: the decay follows from the images seen.

    Attributes:
        network: a copy of the network that holds the average, in evaluation mode, without gradients.
    """

    def __init__(self, network: nn.Module, config: TrainingConfig) -> None:
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self._config = config
        self._average: list[Tensor] = list(self.network.parameters())
        self._weights: list[Tensor] = list(network.parameters())
        self._kept, self._buffers = list(self.network.buffers()), list(network.buffers())

    def decay(self, images_seen: int) -> float:
        """The factor of the step that brings the count to `images_seen`."""
        halflife = float(self._config.ema_halflife_images)
        if self._config.ema_rampup_ratio is not None:
            halflife = min(halflife, images_seen * self._config.ema_rampup_ratio)
        return float(0.5 ** (self._config.batch_size / halflife))

    @torch.no_grad()
    def update(self, images_seen: int) -> None:
        """Take in the weights after the step that brought the count to `images_seen`. Buffers are copied."""
        torch._foreach_lerp_(self._average, self._weights, 1.0 - self.decay(images_seen))
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)
