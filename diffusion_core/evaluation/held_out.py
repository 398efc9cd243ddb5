"""Held-out images as a model sees them, for figures that need no generated ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_core.bundle import Bundle
from diffusion_core.data.shards import ImageDataset
from diffusion_core.evaluation.classifier import blocks
from diffusion_core.progress import Progress


class HeldOut(NamedTuple):
    """Pixels (N, H, W, C) uint8, the condition for the network, if any, and the places (N,) in the split."""

    pixels: Tensor
    cond: dict[str, Tensor] | None
    places: Tensor


def held_out_batches(
    bundle: Bundle, dataset: ImageDataset, images: int, batch_size: int, title: str
) -> Iterator[HeldOut]:
    """The first images of the test split, each with its own label, on the device of the network; tells the progress."""
    device = next(bundle.network.parameters()).device
    count, place = min(images, dataset.num_rows("test")), 0
    with Progress(title, count) as progress:
        for block in blocks(dataset, "test", count):
            for first in range(0, len(block.images), batch_size):
                rows = slice(first, first + batch_size)
                pixels = torch.from_numpy(np.ascontiguousarray(block.images[rows])).to(device)
                cond = None
                if block.labels is not None and bundle.config.class_names:
                    cond = {"label": torch.from_numpy(block.labels[rows]).long().to(device)}
                yield HeldOut(pixels, cond, torch.arange(place, place + len(pixels)))
                place += len(pixels)
                progress.advance(len(pixels))
