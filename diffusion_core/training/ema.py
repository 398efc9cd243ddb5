"""The moving average of the weights, which is what a finished model consists of."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffusion_core.training.config import EmaKind, TrainingConfig
from diffusion_core.training.profiles import gamma_of, power_decay


class Ema:
    """A moving average of the weights in float32.

    After each optimizer step, and only then: average <- decay * average + (1 - decay) * weights. The state is the
    average alone: the decay follows from the images seen. It is

    * 0.5 ** (batch_size / half-life), with a half-life of at most `ema_rampup_ratio` times the images seen, so that the
      random start is forgotten early (Karras et al. 2022, appendix F.2), or
    * with `sigma_rel`, that of a power function which is this wide (Karras et al. 2024, see `profiles`).

    Attributes:
        network: a copy of the network that holds the average, in evaluation mode, without gradients.
    """

    def __init__(self, network: nn.Module, config: TrainingConfig, sigma_rel: float | None = None) -> None:
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self._config = config
        self._gamma = None if sigma_rel is None else gamma_of(sigma_rel)
        self._average: list[Tensor] = list(self.network.parameters())
        self._weights: list[Tensor] = list(network.parameters())
        self._kept, self._buffers = list(self.network.buffers()), list(network.buffers())

    def decay(self, images_seen: int) -> float:
        """The factor of the step that brings the count to `images_seen`."""
        if self._gamma is not None:
            return power_decay(self._gamma, images_seen, self._config.batch_size)
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


def averages(network: nn.Module, config: TrainingConfig) -> dict[str, Ema]:
    """The averages that a run keeps, by the name of their part in a checkpoint. The bundle holds the one named ema."""
    if config.ema is EmaKind.HALFLIFE:
        return {"ema": Ema(network, config)}
    first, second = config.ema_sigma_rels
    return {"ema": Ema(network, config, first), "ema_2": Ema(network, config, second)}
