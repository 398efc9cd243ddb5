"""The handwritten digits that come with scikit-learn: a source that needs no download."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import LabelSource, SourceConfig, SourceKind
from diffusion_core.data.sources.base import Item, Reader, Scan, Source
from diffusion_core.data.sources.labels import UNKNOWN, class_numbers, distinct_values
from diffusion_core.data.sources.listing import SourceFile
from diffusion_core.store import Directory

DIGITS_KEY = "scikit-learn/digits"


def digits_to_uint8(grey: np.ndarray) -> np.ndarray:
    """Grey levels 0 to 16 of the bundled digits → 0 to 255: floor(level * 255 / 16 + 1/2)."""
    return np.floor(np.asarray(grey, np.float64) * 255 / 16 + 0.5).astype(np.uint8)


def digits_from_uint8(pixels: np.ndarray) -> np.ndarray:
    """The exact inverse of `digits_to_uint8`, for any pixel the nearest of the levels 0 to 16, as float64."""
    return np.floor(np.asarray(pixels, np.float64) * 16 / 255 + 0.5)


@dataclass(frozen=True)
class DigitsReader(Reader):
    """All the digits: (N, 8, 8) uint8."""

    images: np.ndarray

    @property
    def random_access(self) -> bool:
        return True

    def key(self, item: int) -> str:
        return f"{DIGITS_KEY}#{item}"

    def read(self, items: np.ndarray) -> Iterator[Item]:
        for slot, item in enumerate(items):
            yield Item(slot, self.key(int(item)), self.images[item])


class DigitsSource(Source):
    """scikit-learn's 1,797 handwritten digits, 8x8, grey levels 0 to 16 scaled by `digits_to_uint8`."""

    kind = SourceKind.DIGITS

    def __init__(self, config: SourceConfig) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise UserError("source.kind: digits needs the package scikit-learn, which is not installed.")
        stamp = f"scikit-learn {importlib.metadata.version('scikit-learn')}"
        super().__init__(config, Directory("."), [SourceFile(DIGITS_KEY, 0, stamp)])

    def hash(self, file: SourceFile) -> str:
        images, labels = _load_digits()
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def scan(self, digests: dict[str, str]) -> Scan:
        images, labels = _load_digits()
        numbers, names = None, list[str]()
        if self.config.labels is not LabelSource.NONE:
            distinct, which = distinct_values(labels)
            classes, names = class_numbers(distinct, self.config)
            numbers = classes[which]
        return Scan(
            reader=DigitsReader(images),
            labels=numbers,
            splits=np.full(len(images), UNKNOWN, np.int8),
            candidates=np.arange(len(images)),
            class_names=names,
            has_text=False,
        )


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """((1797, 8, 8) uint8, (1797,) int64)"""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits_to_uint8(digits.images), digits.target.astype(np.int64)
