"""What sources of arrays have in common: images of one shape and type, one after the other in a file."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import LabelSource, SplitSource
from diffusion_core.data.shards import SPLITS
from diffusion_core.data.sources.base import Item, Reader, Scan, Source, by_part, part_of
from diffusion_core.data.sources.hashed import HashedFile
from diffusion_core.data.sources.labels import UNKNOWN, class_numbers, distinct_values, label_gaps
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.store import Directory

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, struct.error)
_BLOCK_BYTES = 4 << 20
_CHUNK_BYTES = 128 << 20


def buffered(stream: Any) -> io.BufferedReader:
    """A file of the store in larger pieces: gzip and zip ask for a few bytes at a time, on S3 by a request each."""
    return io.BufferedReader(stream, 1 << 20)


@dataclass(frozen=True)
class ImageArray:
    """One array of images inside a file."""

    file: HashedFile
    member: str  # inside an archive; empty for a file of its own
    shape: tuple[int, ...]  # (N, H, W) or (N, H, W, C)
    offset: int  # bytes before the first pixel, after decompression
    first: int  # number of its first item
    split: str | None

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:])

    def item_key(self, row: int) -> str:
        return f"{self.file.key}#{self.member}{'/' if self.member else ''}{row}"


@dataclass(frozen=True)
class ArrayReader(Reader):
    """Reads arrays from their beginning, in blocks; what lies between the wanted rows is passed over."""

    place: Directory
    arrays: tuple[ImageArray, ...]

    @abstractmethod
    def open(self, array: ImageArray) -> AbstractContextManager[Any]:
        """The uncompressed bytes of an array's file, as a stream."""

    def key(self, item: int) -> str:
        array = part_of(item, self.arrays)
        return array.item_key(item - array.first)

    def chunks(self) -> list[range]:
        return [
            range(array.first + start, array.first + min(start + rows, array.rows))
            for array in self.arrays
            for rows in [max(1, _CHUNK_BYTES // array.row_bytes)]
            for start in range(0, array.rows, rows)
        ]

    def read(self, items: np.ndarray) -> Iterator[Item]:
        for array, slots, rows in by_part(items, self.arrays):
            with array.file.unchanged():
                yield from self._read(array, slots, rows)

    def _read(self, array: ImageArray, slots: np.ndarray, rows: np.ndarray) -> Iterator[Item]:
        """`rows` (sorted) of one array; those that cannot be read come with the reason."""
        block = max(1, _BLOCK_BYTES // array.row_bytes)
        done = 0
        try:
            with self.open(array) as stream:
                _skip(stream, array.offset)
                for start in range(0, int(rows[-1]) + 1, block):
                    count = min(block, array.rows - start)
                    data = stream.read(count * array.row_bytes)
                    whole = len(data) // array.row_bytes
                    pixels = np.frombuffer(data, np.uint8, whole * array.row_bytes).reshape(whole, *array.shape[1:])
                    stop = int(np.searchsorted(rows, start + whole))
                    for slot, row in zip(slots[done:stop], rows[done:stop], strict=True):
                        yield Item(int(slot), array.item_key(int(row)), pixels[row - start])
                    done = stop
                    if whole < count:
                        raise EOFError("the file ends before its last image")
        except UNREADABLE as error:
            for slot, row in zip(slots[done:], rows[done:], strict=True):
                yield Item(int(slot), array.item_key(int(row)), RejectedItem(f"truncated or damaged file: {error}"))


class ArraySource(Source):
    """What IDX and .npz have in common."""

    def _scan(self, reader: Reader, arrays: Sequence[ImageArray], labels: Sequence[np.ndarray | None]) -> Scan:
        splits = [
            np.full(array.rows, SPLITS.index(array.split) if self._use(array) else UNKNOWN, np.int8) for array in arrays
        ]
        total = sum(array.rows for array in arrays)
        numbers, names = self._labels(arrays, labels)
        numbers, alive, gaps = label_gaps(numbers, np.arange(total), reader.key)
        broken = [(file.key, file.problem) for file in self.files if file.problem]
        return Scan(
            reader=reader,
            labels=numbers,
            splits=np.concatenate(splits),
            candidates=alive,
            class_names=names if numbers is not None else [],
            has_text=False,
            rejected=[*broken, *gaps],
            rejected_images=len(broken) + len(gaps),
        )

    def _use(self, array: ImageArray) -> bool:
        return array.split is not None and self.config.splits is SplitSource.AUTO

    def _labels(
        self, arrays: Sequence[ImageArray], labels: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray | None, list[str]]:
        if self.config.labels in (LabelSource.CLASS_FOLDERS, LabelSource.METADATA):
            raise UserError(f"source.labels: {self.config.labels.value} is for folders of images, not for arrays.")
        if self.config.labels is LabelSource.NONE or all(part is None for part in labels):
            if self.config.labels is LabelSource.COLUMN:
                raise UserError(f"source.labels: {self.config.uri} has no labels.")
            return None, []
        values = [
            value
            for array, part in zip(arrays, labels, strict=True)
            for value in (part.tolist() if part is not None else [None] * array.rows)
        ]
        distinct, which = distinct_values(values)
        numbers, names = class_numbers(distinct, self.config)
        return numbers[which], names


def checked_shape(what: str, shape: tuple[int, ...], most_bytes: int) -> tuple[int, ...]:
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
        raise UserError(
            f"source.uri: {what} has shape {shape}; (N, H, W), (N, H, W, 1), (N, H, W, 3 or 4) are accepted."
        )
    if math.prod(shape) == 0:
        raise UserError(f"source.uri: {what} has shape {shape}: there is no image in it.")
    if math.prod(shape) > most_bytes:
        raise UserError(f"source.uri: {what} has a header that promises {shape}, more than the file can hold.")
    return shape


def _skip(stream: BinaryIO, count: int) -> None:
    if len(stream.read(count)) < count:
        raise EOFError("the file ends inside its header")
