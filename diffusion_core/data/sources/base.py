"""What every kind of source offers: its files, what its images are called and labelled, and a reader of any of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import SourceConfig, SourceKind
from diffusion_core.data.shards import SPLITS
from diffusion_core.data.sources.hashed import HashedFile, hash_file
from diffusion_core.data.sources.listing import SourceFile
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.storage import Directory

LABEL_COLUMNS = ("label", "labels", "class")
TEXT_COLUMNS = ("text", "caption", "prompt")
UNKNOWN = -1  # label or split of an item that has none

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "t10k"),
}


@dataclass(frozen=True)
class Item:
    """One image as it lies in the source.

    slot: its place in the array of item numbers that was asked for; content: the encoded file, (H, W[, C]) uint8
    pixels, or the reason why it cannot be read.
    """

    slot: int
    key: str
    content: bytes | np.ndarray | RejectedItem
    text: str | None = None


class Reader(ABC):
    """Reads items by number. It can be pickled and sent to a worker; it holds no open file."""

    @property
    def random_access(self) -> bool:
        """True if reading some items costs no more than these items."""
        return False

    @abstractmethod
    def read(self, items: np.ndarray) -> Iterator[Item]:
        """The items of these numbers, (N,) int64 without repetition, each once, in whatever order reads fastest.

        Raises:
            SourceChanged: at the end at the latest, if a file is not what it was when it was hashed.
        """

    @abstractmethod
    def key(self, item: int) -> str:
        """Where an item comes from."""

    def chunks(self) -> list[range]:
        """Ranges of item numbers that are read together, for sources without random access."""
        return []


@dataclass(frozen=True)
class Scan:
    """What a source holds. Items are numbered 0, 1, 2, ... in the order of their keys.

    labels: (N,) int32 class of each item, -1 where it has none; None for a source without labels.
    splits: (N,) int8 index into SPLITS, -1 where the source does not say.
    candidates: (M,) int64 numbers of the items that may become rows; the others are among `rejected`.
    rejected: (key, reason); `rejected_images` of them count as images for the threshold.
    """

    reader: Reader
    labels: np.ndarray | None
    splits: np.ndarray
    candidates: np.ndarray
    class_names: list[str]
    has_text: bool
    rejected: list[tuple[str, str]] = field(default_factory=list)
    rejected_images: int = 0


class Source(ABC):
    """A listed source."""

    kind: ClassVar[SourceKind]

    def __init__(self, config: SourceConfig, place: Directory, files: Sequence[SourceFile]) -> None:
        self.config, self.place, self.files = config, place, list(files)

    def complete(self) -> None:
        """Find the files that others name, and count them among the source's."""
        return None

    def limit(self, max_bytes: int) -> None:
        """Exclude image files that are larger than this. Files that hold many images are not concerned."""
        large = [file for file in self.files if file.size > max_bytes and self.is_image(file)]
        self.exclude({file.key: f"too large a file: {file.size:,} bytes" for file in large})

    def is_image(self, file: SourceFile) -> bool:
        """Whether this file is one encoded image."""
        del file
        return False

    def exclude(self, problems: dict[str, str]) -> None:
        """From now on these files cannot be read: why, by key."""
        self.files = [
            replace(file, problem=problems[file.key]) if file.key in problems else file for file in self.files
        ]

    def needs_hash(self, file: SourceFile) -> bool:
        """Whether the content of this file can reach the dataset."""
        return file.problem is None

    def hash(self, file: SourceFile) -> str:
        """SHA-256 of a file's content. `OSError` if a local file cannot be read."""
        return hash_file(self.place, file)

    def hashed(self, digests: dict[str, str]) -> list[HashedFile]:
        """The files that hold images or labels, with their hashes."""
        return [HashedFile(self.place, file, digests[file.key]) for file in self.files if self.needs_hash(file)]

    @abstractmethod
    def scan(self, digests: dict[str, str]) -> Scan:
        """Find the items. `digests` gives the SHA-256, by key, of every file that `needs_hash`.

        Raises:
            UserError: there is no image, or the source is not laid out as its kind is.
            SourceChanged: a file is not what it was when it was hashed.
        """


def split_named(word: str) -> str | None:
    """The split that a folder or a column's value names, or None."""
    return next((split for split, words in _SPLIT_WORDS.items() if word.lower() in words), None)


def split_in(key: str) -> str | None:
    """The split that a file's name, or else one of its folders, contains as a word: `train-00000.parquet`, `test/0`."""
    words = (word for part in reversed(key.split("/")) for word in re.split(r"[^a-z0-9]+", part.lower()))
    return next((split for word in words if (split := split_named(word))), None)


def class_numbers(
    distinct: Sequence[Any], config: SourceConfig, declared: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """The different labels of a source → the class number of each, int32, -1 for "no label"; and the class names.

    Numbers that index declared names (`class_names`, or a Hugging Face ClassLabel) stay as they are; text may be such a
    name, or else such a number. Otherwise the different values, sorted (as numbers if all of them are), become the
    classes 0, 1, 2, ...; so a gap in the numbers leaves no empty class. None, "", negative numbers and NaN say that
    there is no label.

    Raises:
        UserError: a label that is neither text nor a whole number, or outside the declared classes.
    """
    texts = [None if _is_no_label(value) else _checked(value) for value in distinct]
    present = sorted({text for text in texts if text is not None}, key=_in_order)
    names = list(config.class_names or declared or ())
    if not names:
        names, number = present, {text: i for i, text in enumerate(present)}
    elif set(present) <= set(names) and any(value and isinstance(value, str) for value in distinct):
        number = {name: i for i, name in enumerate(names)}
    elif all(re.fullmatch(r"\d+", text) for text in present):
        if present and int(present[-1]) >= len(names):
            raise UserError(f"The label {present[-1]} is outside the {len(names)} class names, 0 to {len(names) - 1}.")
        number = {text: int(text) for text in present}
    else:
        stray = next(text for text in present if text not in names)
        raise UserError(f"The label {stray!r} is not among the class names {', '.join(names[:10])}.")
    return np.array([UNKNOWN if text is None else number[text] for text in texts], np.int32), names


def distinct_values(values: Sequence[Any] | np.ndarray) -> tuple[list[Any], np.ndarray]:
    """The different values and, (N,) int64, which of them each value is."""
    if isinstance(values, np.ndarray):
        unique, inverse = np.unique(values, return_inverse=True)
        return unique.tolist(), inverse
    if (odd := next((value for value in values if isinstance(value, (list, dict))), None)) is not None:
        _checked(odd)
    numbers: dict[Any, int] = {}
    inverse = np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64, len(values))
    return list(numbers), inverse


def split_numbers(names: Sequence[str | None]) -> np.ndarray:
    """(N,) int8 index into SPLITS, -1 for None."""
    return np.array([UNKNOWN if name is None else SPLITS.index(name) for name in names], np.int8)


def label_gaps(
    labels: np.ndarray | None, alive: np.ndarray, reader: Reader
) -> tuple[np.ndarray | None, np.ndarray, list[tuple[str, str]]]:
    """If some items have labels, those without are rejected: (labels or None, remaining items, rejected)."""
    if labels is None or not len(alive) or (labels[alive] == UNKNOWN).all():
        return None, alive, []
    gaps = alive[labels[alive] == UNKNOWN]
    rejected = [(reader.key(int(item)), "no label, and other images have one") for item in gaps]
    return labels, alive[labels[alive] != UNKNOWN], rejected


def _is_no_label(value: Any) -> bool:
    if value is None or value == "":
        return True
    return isinstance(value, (int, float)) and (value < 0 or value != value)


def _checked(value: Any) -> str:
    """A label as text; `UserError` if it is neither text nor a whole number."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole and not isinstance(value, str):
        raise UserError(f"The label {value!r} is not accepted: labels are text or whole numbers.")
    return value if isinstance(value, str) else str(int(value))


def _in_order(value: str) -> tuple[int, int, str]:
    return (0, int(value), value) if re.fullmatch(r"\d+", value) else (1, 0, value)
