"""Models whose images are known beforehand: their samples are put into the store, so that no generation is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffusion_core.bundle import bundle_digest, read_bundle_config
from diffusion_core.data.shards import Batch, ImageDataset, write_dataset
from diffusion_core.evaluation.config import EvaluationConfig
from diffusion_core.generation.imageset import describe
from diffusion_core.stages.work.evaluate import generation_of
from tests.tiny_bundle import tiny_bundle

CLASSES = ("upper", "left")
SIZE = 10


def pictures(labels: np.ndarray, seed: int = 0, noise: float = 25) -> np.ndarray:
    """Images (N, 10, 10, 1) of two classes: a bright upper half, a bright left half, under noise."""
    rng = np.random.default_rng(seed)
    images = np.full((len(labels), SIZE, SIZE, 1), 90.0)
    images[labels == 0, : SIZE // 2] += 60
    images[labels == 1, :, : SIZE // 2] += 60
    return np.clip(images + rng.normal(0, noise, size=images.shape), 0, 255).astype(np.uint8)


def pictures_dataset(store: str | Path, train: int = 300, test: int = 100, labelled: bool = True) -> ImageDataset:
    splits = {}
    for seed, (split, rows) in enumerate({"train": train, "test": test}.items()):
        labels = np.random.default_rng(seed).integers(0, 2, size=rows)
        splits[split] = Batch(pictures(labels, seed), labels if labelled else None)
    return write_dataset(store, "pictures", splits, CLASSES if labelled else (), rows_per_shard=80)


def model_of_quality(
    store: str | Path, dataset: ImageDataset, config: EvaluationConfig, seed: int, noise: float, swapped: float = 0
) -> str:
    """A bundle whose evaluated samples have this much noise (25 is real) and this share of swapped labels."""
    bundle_uri = tiny_bundle(Path(store, "bundles", str(seed)), dataset.class_names, dataset.image_shape, seed)
    bundle = read_bundle_config(bundle_uri)
    generation = generation_of(config, bundle, dataset)
    images = describe(str(store), bundle_uri, bundle_digest(bundle_uri), bundle, generation)
    extensions = images.extend(0, generation.count).extensions
    rng = np.random.default_rng(100)
    for extension in extensions:
        for shard in extension.shards(generation.images_per_shard):
            ids = np.arange(shard.first_image_id, shard.stop)
            labels = images.labels.of(ids)
            labels = np.zeros(len(ids), np.int64) if labels is None else labels
            shown = np.where(rng.random(len(ids)) < swapped, 1 - labels, labels)
            images.commit(shard, pictures(shown, 1000 + shard.number, noise), "known", "test")
        images.finish(extension)
    return bundle_uri
