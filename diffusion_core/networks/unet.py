"""A U-Net that predicts noise, x0 or v (Ho et al. 2020, with the residual blocks of Dhariwal & Nichol 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.networks.blocks import (
    Conditioned,
    Downsample,
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedding,
    Upsample,
    zeroed,
)
from diffusion_core.networks.config import LevelsConfig, UNetConfig


class Stage(nn.Module):
    """A residual block, self-attention where it is wanted, and a change of resolution at the end of a level."""

    def __init__(self, block: ResidualBlock, attention: nn.Module | None, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention if attention is not None else nn.Identity()
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.resample(self.attention(self.block(x, embedding)))


class Encoder(Conditioned):
    """What a U-Net and a classifier of noisy images share: embeddings, the way down, and the middle.

    Args:
        config: widths, depths, and where attention goes.
        channels: channels of the images.
        num_classes: number of classes that it is told as labels, 0 for none.
        size: the shorter side of the images in pixels, which tells at which level each attention resolution is.

    Attributes:
        width: channels of the features in the middle.
        skip_widths: channels of the features on the way down.
    """

    def __init__(self, config: LevelsConfig, channels: int, num_classes: int, size: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.null_label = num_classes
        base, embedding = config.base_channels, 4 * config.base_channels
        self.widths = [base * multiplier for multiplier in config.channel_multipliers]
        self.attended = [size // 2**level in config.attention_resolutions for level in range(len(self.widths))]

        self.time_embedding = TimestepEmbedding(base, embedding)
        self.class_embedding = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)

        self.down = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        self.width, self.skip_widths = base, [base]
        for level, out in enumerate(self.widths):
            for _ in range(config.blocks_per_level):
                self.down.append(self._stage(self.width, out, self.attended[level]))
                self.width = out
                self.skip_widths.append(out)
            if level < len(self.widths) - 1:
                self.downsamples.append(Downsample(self.width))
                self.skip_widths.append(self.width)

        self.middle_1 = self._stage(self.width, self.width, config.middle_attention)
        self.middle_2 = ResidualBlock(self.width, self.width, embedding, config.dropout)

    def encode(self, x_t: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features in the middle, and those on the way down; `embedding` (N, E), activated."""
        h = self.conv_in(x_t)
        skips = [h]
        downsamples = iter(self.downsamples)
        for index, stage in enumerate(self.down):
            h = stage(h, embedding)
            skips.append(h)
            if (index + 1) % self.config.blocks_per_level == 0 and index + 1 < len(self.down):
                h = next(downsamples)(h)
                skips.append(h)
        return self.middle_2(self.middle_1(h, embedding), embedding), skips

    def _stage(self, width: int, out: int, attends: bool, upsamples: bool = False) -> Stage:
        """Made in the order in which it is applied: a seed's first weights depend on it."""
        block = ResidualBlock(width, out, 4 * self.config.base_channels, self.config.dropout)
        attention = SelfAttention(out, max(1, out // self.config.head_channels)) if attends else None
        return Stage(block, attention, Upsample(out) if upsamples else None)


class UNet(Encoder):
    """The network of one image shape.

    Args:
        config: widths, depths, and where attention goes.
        channels: channels of the images.
        num_classes: number of classes, 0 for an unconditional network.
        size: the shorter side of the images in pixels, which tells at which level each attention resolution is.
        out_channels: channels of the output, as `ProcessConfig.output_channels` tells; default: those of the images.

    Attributes:
        null_label: the label that stands for "no label" (= num_classes).
    """

    def __init__(
        self, config: UNetConfig, channels: int, num_classes: int, size: int, out_channels: int | None = None
    ) -> None:
        super().__init__(config, channels, num_classes, size)
        width, skips = self.width, list(self.skip_widths)
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(self.widths))):
            for index in range(config.blocks_per_level + 1):
                last = index == config.blocks_per_level and level > 0
                self.up.append(self._stage(width + skips.pop(), out, self.attended[level], upsamples=last))
                width = out

        self.norm_out = GroupNorm(width)
        self.conv_out = zeroed(nn.Conv2d(width, out_channels or channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction for noisy images.

        Args:
            x_t: (N, C, H, W), floating.
            t: (N,) times, of any dtype.
            label: (N,) int64 in [0, num_classes], where num_classes means no label; None is no label for all.

        Returns:
            (N, out_channels, H, W), in the dtype of x_t, or of autocast where that is on.

        Raises:
            ValueError: if labels are given to an unconditional network.
        """
        embedding = F.silu(self.conditioning(t, label))
        h, skips = self.encode(x_t, embedding)
        for stage in self.up:
            h = stage(torch.cat((h, skips.pop()), dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(h)))
