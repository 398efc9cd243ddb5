"""Sources that are arrays: IDX files (MNIST, Fashion-MNIST), .npz archives, and scikit-learn's bundled digits."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import importlib.util
import math
import re
import struct
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import LabelSource, SourceConfig, SourceKind, SplitSource
from diffusion_core.data.shards import SPLITS
from diffusion_core.data.sources.base import (
    UNKNOWN,
    Item,
    Reader,
    Scan,
    Source,
    class_numbers,
    distinct_values,
    label_gaps,
    split_in,
)
from diffusion_core.data.sources.listing import SourceFile, suffix
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.storage import Directory

_BLOCK_BYTES = 4 << 20
_CHUNK_BYTES = 128 << 20
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, struct.error)


def digits_to_uint8(grey: np.ndarray) -> np.ndarray:
    """Grey levels 0 to 16 of the bundled digits → 0 to 255: floor(level * 255 / 16 + 1/2)."""
    return np.floor(np.asarray(grey, np.float64) * 255 / 16 + 0.5).astype(np.uint8)


def digits_from_uint8(pixels: np.ndarray) -> np.ndarray:
    """The exact inverse of `digits_to_uint8`, for any pixel the nearest of the levels 0 to 16, as float64."""
    return np.floor(np.asarray(pixels, np.float64) * 16 / 255 + 0.5)


@dataclass(frozen=True)
class _Array:
    """One array of images inside a file."""

    key: str  # of the file
    member: str  # inside an archive; empty for a file of its own
    shape: tuple[int, ...]  # (N, H, W) or (N, H, W, C)
    offset: int  # bytes before the first pixel, after decompression
    first: int  # number of its first item
    split: str | None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:])

    def item_key(self, row: int) -> str:
        return f"{self.key}#{self.member}{'/' if self.member else ''}{row}"


class ArrayReader(Reader):
    """Reads arrays from their beginning, in blocks; what lies between the wanted rows is passed over."""

    place: Directory
    arrays: tuple[_Array, ...]

    @abstractmethod
    def open(self, array: _Array) -> BinaryIO:
        """The uncompressed bytes of an array's file."""

    def key(self, item: int) -> str:
        array = self.arrays[int(np.searchsorted([array.first for array in self.arrays], item, side="right")) - 1]
        return array.item_key(item - array.first)

    def chunks(self) -> list[range]:
        return [
            range(array.first + start, array.first + min(start + rows, array.shape[0]))
            for array in self.arrays
            for rows in [max(1, _CHUNK_BYTES // array.row_bytes)]
            for start in range(0, array.shape[0], rows)
        ]

    def read(self, items: np.ndarray) -> Iterator[Item]:
        order = np.argsort(items, kind="stable")
        for array in self.arrays:
            low, high = np.searchsorted(items[order], (array.first, array.first + array.shape[0]))
            if low < high:
                yield from self._read(array, order[low:high], items[order[low:high]] - array.first)

    def _read(self, array: _Array, slots: np.ndarray, rows: np.ndarray) -> Iterator[Item]:
        """`rows` (sorted) of one array; those that cannot be read come with the reason."""
        block = max(1, _BLOCK_BYTES // array.row_bytes)
        done = 0
        try:
            with self.open(array) as stream:
                _skip(stream, array.offset)
                for start in range(0, int(rows[-1]) + 1, block):
                    count = min(block, array.shape[0] - start)
                    data = stream.read(count * array.row_bytes)
                    whole = len(data) // array.row_bytes
                    pixels = np.frombuffer(data, np.uint8, whole * array.row_bytes).reshape(whole, *array.shape[1:])
                    stop = int(np.searchsorted(rows, start + whole))
                    for slot, row in zip(slots[done:stop], rows[done:stop], strict=True):
                        yield Item(int(slot), array.item_key(int(row)), pixels[row - start])
                    done = stop
                    if whole < count:
                        raise EOFError("the file ends before its last image")
        except _UNREADABLE as error:
            if isinstance(error, OSError) and not self.place.is_local and not isinstance(error, gzip.BadGzipFile):
                raise  # it may be the network, and a reject would be for ever
            for slot, row in zip(slots[done:], rows[done:], strict=True):
                yield Item(int(slot), array.item_key(int(row)), RejectedItem(f"truncated or damaged file: {error}"))


class ArraySource(Source):
    """What IDX and .npz have in common."""

    def _scan(self, reader: Reader, arrays: Sequence[_Array], labels: Sequence[np.ndarray | None]) -> Scan:
        splits = [
            np.full(array.shape[0], SPLITS.index(array.split) if self._use(array) else UNKNOWN, np.int8)
            for array in arrays
        ]
        total = sum(array.shape[0] for array in arrays)
        numbers, names = self._labels(arrays, labels)
        numbers, alive, gaps = label_gaps(numbers, np.arange(total), reader)
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

    def _use(self, array: _Array) -> bool:
        return array.split is not None and self.config.splits is SplitSource.AUTO

    def _labels(
        self, arrays: Sequence[_Array], labels: Sequence[np.ndarray | None]
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
            for value in (part.tolist() if part is not None else [None] * array.shape[0])
        ]
        distinct, which = distinct_values(values)
        numbers, names = class_numbers(distinct, self.config)
        return numbers[which], names


def is_idx(key: str) -> bool:
    return re.search(r"[.-]ubyte(\.gz)?$|\.idx(\.gz)?$", key) is not None


@dataclass(frozen=True)
class IdxReader(ArrayReader):
    place: Directory
    arrays: tuple[_Array, ...]

    def open(self, array: _Array) -> BinaryIO:
        return _open_idx(self.place, array.key)


class IdxSource(ArraySource):
    """Pairs `<name>-images-idx3-ubyte[.gz]` and `<name>-labels-idx1-ubyte[.gz]`; train and t10k give the splits."""

    kind = SourceKind.IDX

    def needs_hash(self, file: SourceFile) -> bool:
        return file.problem is None and is_idx(file.key)

    def scan(self, digests: dict[str, str]) -> Scan:
        keys = [file.key for file in filter(self.needs_hash, self.files)]
        arrays: list[_Array] = []
        labels: list[np.ndarray | None] = []
        for key in (key for key in keys if "labels" not in key.rpartition("/")[2]):
            shape, offset = self._header(key)
            if len(shape) not in (3, 4):
                raise UserError(f"source.uri: {key} has {len(shape)} dimensions; images have 3, or 4 with channels.")
            first = sum(array.shape[0] for array in arrays)
            arrays.append(
                _Array(key, "", _checked_shape(key, shape, 1100 * self.place.size(key)), offset, first, split_in(key))
            )
            labels.append(self._label_file(key, keys, shape[0]))
        if not arrays:
            raise UserError(f"source.uri: {self.config.uri} holds no readable IDX file of images.")
        return self._scan(IdxReader(self.place, tuple(arrays)), arrays, labels)

    def _label_file(self, images: str, keys: Sequence[str], count: int) -> np.ndarray | None:
        folder, slash, name = images.rpartition("/")
        wanted = folder + slash + name.replace("images", "labels").replace("idx3", "idx1")
        key = next((k for k in keys if k != images and k.removesuffix(".gz") == wanted.removesuffix(".gz")), None)
        if key is None:
            return None
        shape, offset = self._header(key)
        if shape != (count,):
            raise UserError(f"source.uri: {key} has shape {shape}, and {images} has {count} images.")
        try:
            with _open_idx(self.place, key) as stream:
                values = np.frombuffer(stream.read(offset + count), np.uint8, count, offset)
        except _UNREADABLE as error:
            raise UserError(f"source.uri: the labels in {key} are truncated or damaged ({error}).") from error
        return values

    def _header(self, key: str) -> tuple[tuple[int, ...], int]:
        """(shape, bytes of the header) of an IDX file of bytes."""
        try:
            with _open_idx(self.place, key) as stream:
                zero, kind, dimensions = struct.unpack(">HBB", stream.read(4))
                shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
        except _UNREADABLE as error:
            raise UserError(f"source.uri: {key} is not an IDX file: its header cannot be read ({error}).") from error
        if zero != 0 or kind != 8:
            raise UserError(
                f"source.uri: {key} is not an IDX file of unsigned bytes (it begins {zero:04x} {kind:02x})."
            )
        return shape, 4 + 4 * dimensions


def _open_idx(place: Directory, key: str) -> BinaryIO:
    stream = place.open(key)
    return gzip.GzipFile(fileobj=stream) if key.endswith(".gz") else stream  # type: ignore[return-value]


@dataclass(frozen=True)
class NpzReader(ArrayReader):
    place: Directory
    arrays: tuple[_Array, ...]

    @contextmanager
    def _opened(self, array: _Array) -> Iterator[IO[bytes]]:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.place.open(array.key)))
            yield stack.enter_context(archive.open(f"{array.member}.npy"))

    def open(self, array: _Array) -> BinaryIO:
        return self._opened(array)  # type: ignore[return-value]


class NpzSource(ArraySource):
    """`images` and `labels`, or `x_train`, `y_train`, `x_test`, `y_test`, or `train_images`, `train_labels`, ..."""

    kind = SourceKind.NPZ

    def needs_hash(self, file: SourceFile) -> bool:
        return file.problem is None and suffix(file.key) == ".npz"

    def scan(self, digests: dict[str, str]) -> Scan:
        arrays: list[_Array] = []
        labels: list[np.ndarray | None] = []
        for key in (file.key for file in filter(self.needs_hash, self.files)):
            try:
                with self.place.open(key) as stream, np.load(stream, allow_pickle=False) as archive:
                    self._add(key, archive, arrays, labels)
            except _UNREADABLE as error:
                raise UserError(f"source.uri: {key} is not a readable .npz archive ({error}).") from error
        if not arrays:
            raise UserError(f"source.uri: {self.config.uri} holds no readable .npz archive.")
        return self._scan(NpzReader(self.place, tuple(arrays)), arrays, labels)

    def _add(
        self, key: str, archive: np.lib.npyio.NpzFile, arrays: list[_Array], labels: list[np.ndarray | None]
    ) -> None:
        pairs = _npz_pairs(archive.files)
        if not pairs:
            raise UserError(
                f"source.uri: {key} has the arrays {', '.join(archive.files)}; images (and labels), or x_train (and "
                "y_train, x_test, y_test) are accepted."
            )
        for images, label, split in pairs:
            shape, offset, size = self._header(key, archive, images)
            values = None if label is None else archive[label].reshape(-1)
            if values is not None and len(values) != shape[0]:
                raise UserError(f"source.uri: {key} has {shape[0]} {images} and {len(values)} {label}.")
            first = sum(array.shape[0] for array in arrays)
            shape = _checked_shape(f"{images} of {key}", shape, size - offset)
            arrays.append(_Array(key, images, shape, offset, first, split))
            labels.append(values)

    def _header(self, key: str, archive: np.lib.npyio.NpzFile, name: str) -> tuple[tuple[int, ...], int, int]:
        """(shape, bytes of the header, bytes of the member)"""
        assert archive.zip is not None
        size = archive.zip.getinfo(f"{name}.npy").file_size
        with archive.zip.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            offset = stream.tell()
        if dtype != np.uint8:
            raise UserError(f"source.uri: {name} of {key} is {dtype}; images are uint8, 0 to 255.")
        if fortran and len(shape) > 1:
            raise UserError(f"source.uri: {name} of {key} is in Fortran order; save np.ascontiguousarray of it.")
        return shape, offset, size


def _npz_pairs(names: Sequence[str]) -> list[tuple[str, str | None, str | None]]:
    """(images, labels, split) for each pair of arrays with usual names."""
    found: list[tuple[str, str | None, str | None]] = []
    for images, label in (("images", "labels"), ("x", "y"), ("image", "label"), ("arr_0", "arr_1")):
        if images in names:
            return [(images, label if label in names else None, None)]
        for split, words in (("train", ["train"]), ("validation", ["val", "valid"]), ("test", ["test"])):
            for word in words:
                for x, y in ((f"{images}_{word}", f"{label}_{word}"), (f"{word}_{images}", f"{word}_{label}")):
                    if x in names:
                        found.append((x, y if y in names else None, split))
    return found


def _checked_shape(what: str, shape: tuple[int, ...], most_bytes: int) -> tuple[int, ...]:
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


@dataclass(frozen=True)
class DigitsReader(Reader):
    """All the digits: (N, 8, 8) uint8."""

    images: np.ndarray

    random_access = True

    def key(self, item: int) -> str:
        return f"{DIGITS_KEY}#{item}"

    def read(self, items: np.ndarray) -> Iterator[Item]:
        for slot, item in enumerate(items):
            yield Item(slot, self.key(int(item)), self.images[item])


DIGITS_KEY = "scikit-learn/digits"


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
