"""What every kind of source offers: its files, a scan that finds and labels its images, and a reader of any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from diffusion_core.data.config import SourceConfig, SourceKind
from diffusion_core.data.sources.hashed import HashedFile, hash_file
from diffusion_core.data.sources.listing import SourceFile
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.store import Directory


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


class Part(Protocol):
    """Some of a source's items that lie in one file, one after the other."""

    @property
    def first(self) -> int:
        """Number of its first item."""

    @property
    def rows(self) -> int: ...


PartT = TypeVar("PartT", bound=Part)


def part_of(item: int, parts: Sequence[PartT]) -> PartT:
    return parts[bisect_right(parts, item, key=lambda part: part.first) - 1]


def by_part(items: np.ndarray, parts: Sequence[PartT]) -> Iterator[tuple[PartT, np.ndarray, np.ndarray]]:
    """Each part that holds any of `items`, with their slots and their rows in the part, sorted by row."""
    order = np.argsort(items, kind="stable")
    for part in parts:
        low, high = np.searchsorted(items[order], (part.first, part.first + part.rows))
        if low < high:
            yield part, order[low:high], items[order[low:high]] - part.first


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
