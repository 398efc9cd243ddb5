"""From the configuration of a network to the network."""

from __future__ import annotations

from diffusion_core.config import UserError
from diffusion_core.networks.classifier import NoisyClassifier
from diffusion_core.networks.config import DiTConfig, NetworkConfig, NoisyClassifierConfig, check_image_size
from diffusion_core.networks.dit import DiT
from diffusion_core.networks.unet import UNet


def build_network(
    config: NetworkConfig,
    image_shape: tuple[int, int, int],
    num_classes: int,
    out_channels: int | None = None,
) -> UNet | DiT | NoisyClassifier:
    """The network of a configuration for images of one shape.

    Args:
        image_shape: (height, width, channels).
        num_classes: number of classes, 0 for an unconditional network.
        out_channels: channels of the output, as `ProcessConfig.output_channels` tells, unless it is a classifier;
            default: those of the images.

    Raises:
        UserError: if the network cannot take images of this size, or the number of classes is negative, or too small
            for a classifier.
    """
    height, width, channels = image_shape
    check_image_size(config, height, width)
    if num_classes < 0:
        raise UserError(f"num_classes: {num_classes} is not accepted: it must be 0 (unconditional) or more.")
    if isinstance(config, NoisyClassifierConfig):
        if num_classes < 2:
            raise UserError("network.kind: classifier needs images of two classes at least.")
        return NoisyClassifier(config, channels, num_classes, min(height, width))
    if isinstance(config, DiTConfig):
        return DiT(config, (height, width), channels, num_classes, out_channels)
    return UNet(config, channels, num_classes, min(height, width), out_channels)
