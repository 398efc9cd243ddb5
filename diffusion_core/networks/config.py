"""Configuration of the networks. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator

from diffusion_core.config import Config, UserError


class LevelsConfig(Config):
    """Levels of residual blocks with self-attention, each of half the resolution of the one before."""

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
    def _heads_divide_channels(self) -> Self:
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


class UNetConfig(LevelsConfig):
    """A U-Net of residual blocks with self-attention (Ho et al. 2020, Dhariwal & Nichol 2021)."""

    kind: Literal["unet"] = Field("unet", description="Architecture: a U-Net of convolutions, good for small images.")

    @property
    def summary(self) -> str:
        """Kind and size in a few words, for the model card."""
        return f"{self.kind}, {self.base_channels} base channels"


class NoisyClassifierConfig(LevelsConfig):
    """A classifier of noisy images, the down-sampling half of the U-Net (Dhariwal & Nichol 2021)."""

    model_config = ConfigDict(json_schema_extra={"required": ["kind"]})

    kind: Literal["classifier"] = Field(
        "classifier", description="No model of images but a classifier of noisy ones, for classifier guidance."
    )

    @property
    def summary(self) -> str:
        """Kind and size in a few words, for the model card."""
        return f"{self.kind} of noisy images, {self.base_channels} base channels"


class DiTConfig(Config):
    """A diffusion transformer with adaLN-zero blocks (Peebles & Xie 2023); the defaults are those of their DiT-S/2."""

    # A mapping without a kind is a U-Net: in a schema the two must not be taken for each other.
    model_config = ConfigDict(json_schema_extra={"required": ["kind"]})

    kind: Literal["dit"] = Field("dit", description="Architecture: a transformer on patches, good for large networks.")
    patch_size: int = Field(2, ge=1, le=64, description="Height and width in pixels of the patches that are tokens.")
    width: int = Field(384, ge=4, le=8192, multiple_of=4, description="Channels of each token, a multiple of 4.")
    depth: int = Field(12, ge=1, le=128, description="Transformer blocks.")
    head_channels: int = Field(
        64, ge=1, le=1024, description="Channels of each attention head; a lesser width has one head."
    )
    mlp_ratio: float = Field(4.0, ge=0.25, le=16, description="Width of the layer inside each block's MLP, in widths.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of features dropped inside each block's MLP.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DiTConfig:
        if self.width > self.head_channels and self.width % self.head_channels:
            raise ValueError(f"head_channels is {self.head_channels}, which does not divide the width {self.width}")
        return self

    @property
    def summary(self) -> str:
        """Kind and size in a few words, for the model card."""
        return f"{self.kind}, {self.depth} blocks of width {self.width} on patches of {self.patch_size} pixels"


class _AnyOf:
    """Shows a union as `anyOf` in a JSON Schema, the one form of a choice that the Prefect UI offers."""

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        schema["anyOf"] = schema.pop("oneOf")
        return schema


def _tag(value: Any) -> str:
    kind = value.get("kind", "unet") if isinstance(value, dict) else getattr(value, "kind", "")
    return f"kind={kind}"


# A network by its kind; what was written before there was a choice has none and means the U-Net.
NetworkConfig = Annotated[
    Annotated[UNetConfig, Tag("kind=unet")]
    | Annotated[DiTConfig, Tag("kind=dit")]
    | Annotated[NoisyClassifierConfig, Tag("kind=classifier")],
    Discriminator(
        _tag, custom_error_type="network_kind", custom_error_message="its kind must be unet, dit or classifier"
    ),
    _AnyOf(),
]


def check_image_size(config: NetworkConfig, height: int, width: int) -> None:
    """Refuse an image size that the network cannot take.

    A U-Net has to halve it often enough and to meet every size chosen for attention, a transformer to cut it into whole
    patches.

    Raises:
        UserError: naming the field, the size and what is accepted.
    """
    if isinstance(config, DiTConfig):
        _check_patches(config.patch_size, height, width)
    else:
        _check_levels(config, height, width)


def _check_patches(patch_size: int, height: int, width: int) -> None:
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise UserError(
            f"Images of {height}x{width} pixels do not fit network.patch_size: patches of {patch_size} need a height "
            f"and a width that {patch_size} divides."
        )


def _check_levels(config: LevelsConfig, height: int, width: int) -> None:
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
