"""A diffusion transformer that predicts noise, x0 or v (Peebles & Xie 2023), under the interface of the U-Net."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.networks.blocks import Conditioned, TimestepEmbedding, zeroed
from diffusion_core.networks.config import DiTConfig

TIME_FREQUENCIES = 256
_EPS = 1e-6


def patchify(x: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) as tokens (N, H/size * W/size, C * size * size): patches row by row, each as (C, H, W)."""
    n, channels, height, width = x.shape
    cut = x.reshape(n, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * size * size)


def unpatchify(tokens: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`, for a grid of (rows, columns) of patches."""
    n, (rows, columns) = len(tokens), grid
    cut = tokens.reshape(n, rows, columns, -1, size, size)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, rows * size, columns * size)


def grid_positions(grid: tuple[int, int], channels: int) -> Tensor:
    """Sines and cosines of each patch's row and column, of frequencies that fit the grid.

    They rise evenly in the logarithm from a quarter of a wave over the whole side to half a wave a patch, the highest
    that a grid can show (Jaegle et al. 2021, arXiv:2103.03206, section 3.2). Of those of Vaswani et al. 2017, section
    3.5, whose waves are up to 2 pi * 10,000 places long, most are constant over a grid: patches are hard to tell apart,
    and learning starts late.

    Args:
        grid: (rows, columns) of patches.
        channels: a multiple of 4; the first half tells the row, the second the column, each as sines, then cosines.

    Returns:
        (rows * columns, channels) float32.
    """
    lower = torch.linspace(1, 0, channels // 4, dtype=torch.float64)

    def waves(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * (math.pi * (2 * count) ** -lower)
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    rows, columns = waves(grid[0])[:, None], waves(grid[1])[None]
    both = torch.cat((rows.expand(*grid, -1), columns.expand(*grid, -1)), dim=2)
    return both.reshape(-1, channels).float()


class Modulation(nn.Module):
    """Shifts, scales and gates of a block, regressed from the embedding by a layer that starts at zero (adaLN-zero).

    Every part is (N, 1, width), to be applied to all tokens of an image alike.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = zeroed(nn.Linear(width, parts * width))

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(embedding)[:, None].chunk(self.parts, dim=2)


class TokenAttention(nn.Module):
    """Self-attention over tokens (N, L, width), scaled and normalised by `scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class DiTBlock(nn.Module):
    """Attention and an MLP, each between a modulated normalisation and a gate that starts at zero.

    Peebles & Xie 2023, section 3.2 and figure 3, "DiT block with adaLN-Zero".
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.mlp_ratio * config.width)
        self.modulation = Modulation(width, 6)
        self.attention = TokenAttention(width, max(1, width // config.head_channels))
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(approximate="tanh"),
            nn.Dropout(config.dropout) if config.dropout > 0.0 else nn.Identity(),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Args: x (N, L, width); embedding (N, width), activated. Returns (N, L, width)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)
        x = x + gate_1 * self.attention(modulated(x, shift_1, scale_1))
        return x + gate_2 * self.mlp(modulated(x, shift_2, scale_2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, L, width) normalised over its channels, then scaled by 1 + scale and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1.0 + scale) + shift


class DiT(Conditioned):
    """The network of one image shape.

    Args:
        config: patches, width and depth.
        image_size: (height, width) of the images in pixels.
        channels: channels of the images.
        num_classes: number of classes, 0 for an unconditional network.
        out_channels: channels of the output; default: those of the images.

    Attributes:
        null_label: the label that stands for "no label" (= num_classes).
    """

    positions: Tensor

    def __init__(
        self,
        config: DiTConfig,
        image_size: tuple[int, int],
        channels: int,
        num_classes: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.null_label = num_classes
        self.grid = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
        pixels = config.patch_size**2
        self.embed = nn.Linear(channels * pixels, config.width)
        # It follows from the configuration, so it is no part of the state.
        self.register_buffer("positions", grid_positions(self.grid, config.width), persistent=False)
        self.time_embedding = TimestepEmbedding(TIME_FREQUENCIES, config.width)
        self.class_embedding = nn.Embedding(num_classes + 1, config.width) if num_classes else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.modulation_out = Modulation(config.width, 2)
        self.out = nn.Linear(config.width, (out_channels or channels) * pixels)
        self._initialise()

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
        tokens = self.embed(patchify(x_t, self.config.patch_size))
        tokens = tokens + self.positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, embedding)
        tokens = self.out(modulated(tokens, *self.modulation_out(embedding)))
        return unpatchify(tokens, self.config.patch_size, self.grid)

    def _initialise(self) -> None:
        """Uniform weights by Glorot & Bengio 2010, and zeros where adaLN-zero wants them.

        Classes keep torch's unit variance, and time is of the same order. From a standard deviation of 0.02, as Peebles
        & Xie have both, the modulation, which is zero at first and sees nothing else, learns many times more slowly.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zeroed(self.out)
