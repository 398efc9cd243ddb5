"""A bundle with random weights, small enough for tests: nothing was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion_core.bundle import BundleConfig, DatasetReference, save_bundle
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.networks import build_network
from diffusion_core.networks.config import UNetConfig
from diffusion_core.store import Directory

DIGITS = tuple(str(digit) for digit in range(10))


def tiny_bundle(
    place: str | Path,
    class_names: Sequence[str] = DIGITS,
    image_shape: tuple[int, int, int] = (8, 8, 1),
    seed: int = 0,
) -> str:
    """Save a bundle at `place` and return its URI. Every weight is random, the zero-initialised ones too."""
    network = UNetConfig(
        base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1, attention_resolutions=(), head_channels=8
    )
    config = BundleConfig(
        process=ProcessConfig(),
        network=network,
        image_shape=image_shape,
        class_names=tuple(class_names),
        dataset=DatasetReference(name="tiny", version="0" * 16, uri="/nowhere"),
        run_id="0123456789abcdef",
        images_seen=0,
    )
    generator = torch.Generator().manual_seed(seed)
    weights = build_network(network, image_shape, len(class_names)).state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
            weights[name] = torch.randn(tensor.shape, generator=generator) * scale + (
                1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
            )
    directory = Directory(place)
    save_bundle(directory, config, weights, b"\x89PNG")
    return directory.uri
