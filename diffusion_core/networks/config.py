"""Configuration of the networks. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffusion_core.config import Config, UserError


class UNetConfig(Config):
    """A U-Net of residual blocks with self-attention (Ho et al. 2020, Dhariwal & Nichol 2021)."""

    kind: Literal["unet"] = Field("unet", description="Architecture of the network.")
    base_channels: int = Field(
        64, ge=4, le=2048, multiple_of=4, description="Channels at the full resolution, a multiple of 4."
    )
    channel_multipliers: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        (1, 2, 2),
        min_length=1,
        max_length=8,
        description="Channels of each level, as multiples of base_channels; every further level halves the resolution.",
    )
    blocks_per_level: int = Field(2, ge=1, le=16, description="Residual blocks of each level on the way down.")
    attention_resolutions: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="Sizes in pixels (shorter side) of the levels with self-attention, as 16 or 8 for images of 32.",
    )
    middle_attention: bool = Field(True, description="Self-attention in the middle, at the lowest size.")
    head_channels: int = Field(
        64, ge=1, le=1024, description="Channels of each attention head; a level with fewer channels has one head."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of features dropped inside each residual block.")

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> UNetConfig:
        for multiplier in self.channel_multipliers:
            channels = self.base_channels * multiplier
            if channels > self.head_channels and channels % self.head_channels:
                raise ValueError(
                    f"head_channels is {self.head_channels}, which does not divide the {channels} channels of a level"
                )
        return self

    @property
    def size_divisor(self) -> int:
        """Height and width of an image must be multiples of this: one halving for every level after the first."""
        return int(2 ** (len(self.channel_multipliers) - 1))


def check_image_size(config: UNetConfig, height: int, width: int) -> None:
    """Refuse an image size that the network cannot halve often enough, or that never has a size chosen for attention.

    Raises:
        UserError: naming the field, the size and what is accepted.
    """
    divisor = config.size_divisor
    if height < 1 or width < 1 or height % divisor or width % divisor:
        raise UserError(
            f"Images of {height}x{width} pixels do not fit network.channel_multipliers: "
            f"{len(config.channel_multipliers)} levels need a height and a width that {divisor} divides."
        )
    sizes = [min(height, width) // 2**level for level in range(len(config.channel_multipliers))]
    for resolution in config.attention_resolutions:
        if resolution not in sizes:
            raise UserError(
                f"network.attention_resolutions: {resolution} never occurs with images of {height}x{width} pixels; "
                f"accepted are {', '.join(map(str, sizes))}."
            )
