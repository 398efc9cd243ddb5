"""Features of real and generated images, by the extractor that the configuration names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from safetensors.numpy import load, save

from diffusion_core.config import UserError
from diffusion_core.data.shards import ImageDataset
from diffusion_core.evaluation.config import EvaluationConfig, Extractor
from diffusion_core.evaluation.distances import GaussianStatistics
from diffusion_core.progress import Progress
from diffusion_core.store import Directory, layout

_ALGORITHM = 1  # raised when the reference is computed differently


class FeatureExtractor(Protocol):
    """Turns images into the features that distances compare."""

    kind: str
    digest: str

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features (N, d) float32 of images (N, H, W, C) uint8."""
        ...


@dataclass(frozen=True)
class Features:
    """What the evaluation keeps of a set of images.

    values: (N, d) float32; seen: class (N,) int64 that the dataset's classifier sees in each image, None without
    classes; asked: class (N,) int64 that each image is meant to show, None without classes.
    """

    values: np.ndarray
    seen: np.ndarray | None = None
    asked: np.ndarray | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of images that show the class asked for."""
        if self.seen is None or self.asked is None:
            return None
        return float((self.seen == self.asked).mean())

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """The features of several sets as those of one, in their order. At least one part."""
        values = np.concatenate([part.values for part in parts])
        return cls(values, _joined([part.seen for part in parts]), _joined([part.asked for part in parts]))

    def to_bytes(self) -> bytes:
        arrays = {"values": self.values, "seen": self.seen, "asked": self.asked}
        return bytes(save({key: np.ascontiguousarray(value) for key, value in arrays.items() if value is not None}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Features:
        return cls(**load(data))


@dataclass(frozen=True)
class Reference:
    """The real side of every comparison.

    statistics: of the whole train split; train: features of its first N images; held_out: of the first N of the test
    split, with their classes. Rows of a split are in random order.
    """

    statistics: GaussianStatistics
    train: np.ndarray
    held_out: Features


def make_extractor(config: EvaluationConfig, dataset: ImageDataset) -> FeatureExtractor:
    """The extractor of a configuration; a classifier is trained now if it is not cached with the dataset.

    Raises:
        UserError: the images are too small, or the named weights are not there or not Inception's.
    """
    if config.extractor is Extractor.inception:
        from diffusion_core.evaluation.inception import InceptionExtractor

        return InceptionExtractor(str(config.inception_weights))
    from diffusion_core.evaluation.classifier import classifier_extractor

    return classifier_extractor(dataset, config.classifier)


class Measurer:
    """Takes everything that the evaluation needs to know of images: features, and the class that is seen in them."""

    def __init__(self, config: EvaluationConfig, dataset: ImageDataset) -> None:
        from diffusion_core.evaluation.classifier import ClassifierExtractor, classifier_extractor

        self.dataset = dataset
        self.extractor = make_extractor(config, dataset)
        self._classifier: ClassifierExtractor | None = None
        if dataset.class_names:
            same = isinstance(self.extractor, ClassifierExtractor)
            self._classifier = self.extractor if same else classifier_extractor(dataset, config.classifier)  # type: ignore[assignment]

    def measure(self, batches: Iterator[tuple[np.ndarray, np.ndarray | None]], total: int, what: str) -> Features:
        """Features of batches of (images (n, H, W, C) uint8, classes asked for (n,) or None)."""
        parts = []
        with Progress(f"features of {what}", total, "features") as progress:
            for images, labels in batches:
                parts.append(self.features(images, labels))
                progress.advance(len(images))
        return Features.joined(parts)

    def features(self, images: np.ndarray, labels: np.ndarray | None) -> Features:
        """Features of images (N, H, W, C) uint8 with the classes asked for (N,), or None."""
        return Features(
            self.extractor.features(images),
            None if self._classifier is None else self._classifier.classify(images),
            None if labels is None else np.asarray(labels, dtype=np.int64),
        )

    def reference(self, count: int) -> Reference:
        """The real side for sets of `count` images; kept with the dataset version, so it is computed once.

        What is kept is known by the extractor alone. The classes seen by a classifier that is not the extractor are
        therefore taken anew: they may have been kept by another one.
        """
        place = self.dataset.directory / layout.extractor(self.extractor.digest)
        key = layout.reference(_ALGORITHM, count)
        if not place.exists(key):
            place.create(key, self._reference(count))
        kept, classifier = _read_reference(place, key), self._classifier
        if classifier is None or classifier is self.extractor:
            return kept
        seen = np.concatenate([classifier.classify(images) for images, _ in _real(self.dataset, "test", count)])
        return replace(kept, held_out=replace(kept.held_out, seen=seen))

    def _reference(self, count: int) -> bytes:
        rows = self.dataset.num_rows("train")
        train = self.measure(_real(self.dataset, "train", rows), rows, "the train split")
        held_out = self.measure(_real(self.dataset, "test", count), count, "held-out images")
        statistics = GaussianStatistics.of(train.values)
        arrays = {
            "mean": statistics.mean,
            "covariance": statistics.covariance,
            "count": np.array([statistics.count]),
            "train": train.values[:count],
            "held_out": held_out.values,
        }
        if held_out.seen is not None and held_out.asked is not None:
            arrays |= {"seen": held_out.seen, "asked": held_out.asked}
        return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def load_reference(dataset: ImageDataset, extractor_digest: str, count: int) -> Reference:
    """The reference that an evaluation kept with its dataset version. Needs no torch. `UserError` if it is gone."""
    place = dataset.directory / layout.extractor(extractor_digest)
    try:
        return _read_reference(place, layout.reference(_ALGORITHM, count))
    except FileNotFoundError:
        raise UserError(f"The reference features in {place.uri} are gone: evaluate again.") from None


def _read_reference(place: Directory, key: str) -> Reference:
    arrays = load(place.read(key))
    statistics = GaussianStatistics(arrays["mean"], arrays["covariance"], int(arrays["count"][0]))
    held_out = Features(arrays["held_out"], arrays.get("seen"), arrays.get("asked"))
    return Reference(statistics, arrays["train"], held_out)


def _joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None


def _real(dataset: ImageDataset, split: str, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    from diffusion_core.evaluation.classifier import blocks

    for batch in blocks(dataset, split, limit):
        yield batch.images, batch.labels
