"""The feature extractor that needs no download: a small CNN trained on the dataset version itself.

With labels it learns the classes. Without, it learns to tell by how many quarter turns an image was rotated (Gidaris et
al. 2018), which needs no label and cannot be done without looking at the shapes. Either way the features are the last
hidden layer. They are comparable only between evaluations that use the same extractor, and its digest says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.config import UserError
from diffusion_core.data.shards import Batch, ImageDataset
from diffusion_core.evaluation.config import ClassifierConfig
from diffusion_core.evaluation.identity import classifier_identity
from diffusion_core.progress import Progress
from diffusion_core.store import Directory, layout
from diffusion_core.store.commit import Damaged, RecordKind, create_or_read, read_recorded, sha256

_RECORD = RecordKind(layout.EXTRACTOR, "a feature extractor", 1)
LARGEST_SIDE = 64  # larger images are averaged down before the network sees them
_GRID = 4  # the last convolutions are averaged over this many cells a side: shape stays, exact place does not
_BATCH = 256
_WARM_UP = 0.1  # share of the steps


class Classifier(nn.Module):
    """Convolutions that halve the image until its shorter side is 4 to 7, then means over a 4x4 grid, then two layers.

    Input: images (N, C, H, W) float32 in [-1, 1]. Output: logits (N, outputs) and features (N, features).
    """

    def __init__(self, image_shape: tuple[int, int, int], outputs: int, width: int, features: int) -> None:
        super().__init__()
        height, width_px, channels = image_shape
        halvings = max(1, math.ceil(math.log2(min(height, width_px, LARGEST_SIDE) / 7.5)))
        stages = [_convolution(channels, width, 1)]
        last = width
        for number in range(halvings):
            wider = width * min(2 ** (number + 1), 4)
            stages += [_convolution(last, wider, 2), _convolution(wider, wider, 1)]
            last = wider
        self.trunk = nn.Sequential(*stages)
        self.hidden = nn.Linear(last * _GRID**2, features)
        self.head = nn.Linear(features, outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = F.silu(self.hidden(F.adaptive_avg_pool2d(self.trunk(images), _GRID).flatten(1)))
        return self.head(features), features


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


class ClassifierExtractor:
    """A trained classifier as an extractor: features, and the class it sees in an image.

    Attributes:
        digest: identifies the extractor: of the dataset version and the training.
        knows_classes: True if it was trained on the dataset's labels, so that `classify` tells classes.
    """

    kind = "classifier"

    def __init__(self, model: Classifier, identity: str, threads: int, knows_classes: bool) -> None:
        self._model, self._threads = model.eval().requires_grad_(False), threads
        self.digest, self.knows_classes = identity, knows_classes

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features (N, d) float32 of images (N, H, W, C) uint8."""
        return self._run(images)[1]

    def classify(self, images: np.ndarray) -> np.ndarray:
        """The most likely class (N,) int64 of each image."""
        return np.asarray(self._run(images)[0].argmax(axis=1))

    @torch.no_grad()
    def _run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, features = [], []
        with fixed_threads(self._threads):
            for start in range(0, len(images), _BATCH):
                block = shrink(images[start : start + _BATCH])
                padded = np.concatenate([block, np.repeat(block[-1:], _BATCH - len(block), axis=0)])
                found = self._model(_network_input(padded))
                logits.append(found[0][: len(block)].numpy())
                features.append(found[1][: len(block)].numpy())
        return np.concatenate(logits), np.concatenate(features)


def classifier_extractor(dataset: ImageDataset, config: ClassifierConfig) -> ClassifierExtractor:
    """The extractor of a dataset version: read from `<dataset>/extractors/<digest>/`, or trained now and kept there.

    Raises:
        UserError: the images are smaller than 8x8, or there is nothing to learn from.
    """
    height, width, _ = dataset.image_shape
    if min(height, width) < 8:
        raise UserError(f"evaluation.extractor: classifier needs images of at least 8x8 pixels, not {height}x{width}.")
    name = classifier_identity(config, dataset.version)
    place = dataset.directory / layout.extractor(name)
    with fixed_threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        outputs = len(dataset.class_names) or _rotations(dataset.image_shape)
        model = Classifier(dataset.image_shape, outputs, config.width, config.features)
        if not place.exists(layout.EXTRACTOR):
            _train(model, dataset, config)
            _keep(place, model, dataset, name)
    _load(model, place)
    return ClassifierExtractor(model, name, config.threads, knows_classes=bool(dataset.class_names))


def _keep(place: Directory, model: Classifier, dataset: ImageDataset, name: str) -> None:
    from safetensors.torch import save

    made = save({key: value.contiguous() for key, value in model.state_dict().items()})
    stored = create_or_read(place, layout.EXTRACTOR_WEIGHTS, made)  # of two evaluations at once, both use the first's
    fields = {
        "digest": name,
        "dataset_version": dataset.version,
        "learned": "classes" if dataset.class_names else "rotations",
        "sha256": sha256(stored),
    }
    _RECORD.commit(place, {}, fields)


def _load(model: Classifier, place: Directory) -> None:
    from safetensors.torch import load

    try:
        data = read_recorded(place, layout.EXTRACTOR_WEIGHTS, _RECORD.read(place)["sha256"])
    except Damaged as error:
        raise UserError(
            f"The feature extractor {place.uri} is damaged: delete that folder and it is trained again."
        ) from error
    model.load_state_dict(load(data))


def _train(model: Classifier, dataset: ImageDataset, config: ClassifierConfig) -> None:
    images, labels = _training_images(dataset, config.images)
    if len(images) < 2:
        raise UserError(f"The dataset {dataset.uri} has {len(images)} training images: too few to train an extractor.")
    steps = max(1, config.images // config.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=False
    )
    draw = np.random.default_rng(config.seed)
    order = _order(len(images), config.batch_size, draw)
    model.train()
    with Progress("train the feature extractor", steps * config.batch_size, "training images") as progress:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, steps)
            rows = next(order)
            batch = _network_input(images[rows])
            if labels is None:
                batch, target = _rotated(batch, draw)
            else:
                target = torch.from_numpy(labels[rows])
            loss = F.cross_entropy(model(batch)[0], target)
            if not torch.isfinite(loss):
                raise UserError(
                    "evaluation.classifier: the loss is not finite; try a learning_rate below "
                    f"{config.learning_rate:g}."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress.advance(config.batch_size, loss=loss.item())


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to zero."""
    done = (step + 1) / steps
    if done < _WARM_UP:
        return done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _order(count: int, batch_size: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of batch after batch: permutation after permutation, so that every image is seen equally often."""
    waiting = np.empty(0, dtype=np.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, draw.permutation(count)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _rotations(image_shape: tuple[int, int, int]) -> int:
    """Rotations that keep the shape: 4 quarter turns of a square, 2 half turns of a rectangle."""
    return 4 if image_shape[0] == image_shape[1] else 2


def _rotated(images: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    count = 4 if images.shape[2] == images.shape[3] else 2
    turns = torch.from_numpy(draw.integers(0, count, size=len(images)))
    out = images.clone()
    for turn in range(1, count):
        chosen = turns == turn
        out[chosen] = torch.rot90(images[chosen], turn * (4 // count), dims=(2, 3))
    return out, turns


def _training_images(dataset: ImageDataset, limit: int) -> tuple[np.ndarray, np.ndarray | None]:
    """At most `limit` training images, shrunk, and their labels. Rows are in random order: the first are a sample."""
    images, labels = [], []
    for batch in blocks(dataset, "train", limit):
        images.append(shrink(batch.images))
        if batch.labels is not None:
            labels.append(batch.labels)
    if not images:
        return np.zeros((0, *dataset.image_shape), np.uint8), None
    return np.concatenate(images), np.concatenate(labels) if labels else None


def blocks(dataset: ImageDataset, split: str, limit: int) -> Iterator[Batch]:
    """The first `limit` rows of a split, shard by shard: one shard at a time is in memory."""
    left = limit
    for record in dataset.shards(split):
        if left <= 0:
            return
        batch = dataset.read_shard(record, with_keys=False)
        yield Batch(batch.images[:left], None if batch.labels is None else batch.labels[:left])
        left -= len(batch)


def shrink(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C) uint8, averaged down until the shorter side is at most 64."""
    _, height, width, _ = images.shape
    shorter = min(height, width)
    if shorter <= LARGEST_SIDE:
        return images
    size = (round(height * LARGEST_SIDE / shorter), round(width * LARGEST_SIDE / shorter))
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    small = F.interpolate(tensor, size=size, mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _network_input(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 to (N, C, H, W) float32 in [-1, 1], in channels_last order."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """The number of CPU threads changes low bits, so it is fixed while features are trained or taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
