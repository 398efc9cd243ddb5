"""Building blocks of the networks. Feature maps are (N, C, H, W), embeddings (N, E)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 4

Module = TypeVar("Module", bound=nn.Module)


def zeroed(module: Module) -> Module:
    """The module with all its parameters set to 0, so that the block which it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_count(channels: int) -> int:
    """Groups of a normalisation: the most that divide the channels, up to 32 and leaving at least 4 channels each."""
    most = max(1, min(MAX_GROUPS, channels // MIN_CHANNELS_PER_GROUP))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) with statistics in float32, of features in any floating dtype.

    Torch's kernels accumulate in float32 also for half-precision features. Autocast is left out here: on a GPU it would
    have the result in float32 as well, at twice the memory traffic and for a convolution that takes half precision.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(group_count(channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class TimestepEmbedding(nn.Module):
    """Sines and cosines of t (Vaswani et al. 2017, section 3.5), then two linear layers.

    t is (N,), real, of any dtype.
    """

    def __init__(self, frequencies: int, channels: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear_1 = nn.Linear(frequencies, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10_000.0) / half))
        angles = t.float()[:, None] * rates
        waves = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class Conditioned(nn.Module):
    """A network that is told the time, and the label if it knows classes.

    Attributes:
        null_label: the label that stands for "no label" (= number of classes).
    """

    null_label: int
    time_embedding: TimestepEmbedding
    class_embedding: nn.Embedding | None

    def conditioning(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Times (N,) and labels (N,) int64 as vectors (N, E); None is no label for all.

        Raises:
            ValueError: if labels are given to an unconditional network.
        """
        embedding: Tensor = self.time_embedding(t)
        if self.class_embedding is None:
            if label is not None:
                raise ValueError("labels were given to an unconditional network")
            return embedding
        if label is None:
            label = torch.full(t.shape, self.null_label, dtype=torch.int64, device=t.device)
        return embedding + self.class_embedding(label)


class ResidualBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts the features between them (AdaGN).

    Dhariwal & Nichol 2021, section 3.1.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out_channels)
        self.norm_2 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Args: x (N, in_channels, H, W); embedding (N, E), activated. Returns (N, out_channels, H, W)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.modulation(embedding).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_2(h), 1.0 + scale)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Self-attention over the H * W places of a feature map, with a residual connection.

    The scaling by 1 / sqrt(head size) is left to `scaled_dot_product_attention`, whose softmax is in float32.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        places = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(places).reshape(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        return x + mixed.transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: every place repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
