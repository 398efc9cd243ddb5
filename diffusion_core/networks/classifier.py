"""A classifier of noisy images, whose gradient guides (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.networks.blocks import GroupNorm, zeroed
from diffusion_core.networks.config import NoisyClassifierConfig
from diffusion_core.networks.unet import Encoder


class NoisyClassifier(Encoder):
    """The U-Net's way down and its middle, the mean over all places, and a linear layer. It starts undecided.

    Args:
        config: widths, depths, and where attention goes.
        channels: channels of the images.
        num_classes: number of classes to tell apart.
        size: the shorter side of the images in pixels, which tells at which level each attention resolution is.
    """

    def __init__(self, config: NoisyClassifierConfig, channels: int, num_classes: int, size: int) -> None:
        super().__init__(config, channels, 0, size)
        self.norm_out = GroupNorm(self.width)
        self.out = zeroed(nn.Linear(self.width, num_classes))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits (N, num_classes) of noisy images (N, C, H, W) at times (N,)."""
        h, _ = self.encode(x_t, F.silu(self.time_embedding(t)))
        return self.out(F.silu(self.norm_out(h)).mean(dim=(2, 3)))
