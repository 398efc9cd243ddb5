"""IDX files, as MNIST and Fashion-MNIST come."""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import SourceKind
from diffusion_core.data.sources.arrays import UNREADABLE, ArrayReader, ArraySource, ImageArray, buffered, checked_shape
from diffusion_core.data.sources.base import Scan
from diffusion_core.data.sources.hashed import HashedFile
from diffusion_core.data.sources.labels import split_in
from diffusion_core.data.sources.listing import SourceFile


def is_idx(key: str) -> bool:
    return re.search(r"[.-]ubyte(\.gz)?$|\.idx(\.gz)?$", key) is not None


class IdxReader(ArrayReader):
    def open(self, array: ImageArray) -> AbstractContextManager[Any]:
        return _open_idx(array.file)


class IdxSource(ArraySource):
    """Pairs `<name>-images-idx3-ubyte[.gz]` and `<name>-labels-idx1-ubyte[.gz]`; train and t10k give the splits."""

    kind = SourceKind.IDX

    def needs_hash(self, file: SourceFile) -> bool:
        return file.problem is None and is_idx(file.key)

    def scan(self, digests: dict[str, str]) -> Scan:
        files = self.hashed(digests)
        arrays: list[ImageArray] = []
        labels: list[np.ndarray | None] = []
        for file in files:
            key = file.key
            if "labels" in key.rpartition("/")[2]:
                continue
            shape, offset = self._header(file)
            if len(shape) not in (3, 4):
                raise UserError(f"source.uri: {key} has {len(shape)} dimensions; images have 3, or 4 with channels.")
            first = sum(array.rows for array in arrays)
            shape = checked_shape(key, shape, 1100 * file.listed.size)  # deflate packs at most 1032 to 1
            arrays.append(ImageArray(file, "", shape, offset, first, split_in(key)))
            labels.append(self._labels_of(key, files, shape[0]))
        if not arrays:
            raise UserError(f"source.uri: {self.config.uri} holds no readable IDX file of images.")
        return self._scan(IdxReader(self.place, tuple(arrays)), arrays, labels)

    def _labels_of(self, images: str, files: Sequence[HashedFile], count: int) -> np.ndarray | None:
        folder, slash, name = images.rpartition("/")
        wanted = folder + slash + name.replace("images", "labels").replace("idx3", "idx1")
        fits = (file for file in files if file.key.removesuffix(".gz") == wanted.removesuffix(".gz") != images)
        file = next(fits, None)
        if file is None:
            return None
        shape, offset = self._header(file)
        if shape != (count,):
            raise UserError(f"source.uri: {file.key} has shape {shape}, and {images} has {count} images.")
        try:
            with file.unchanged(), _open_idx(file) as stream:
                return np.frombuffer(stream.read(offset + count), np.uint8, count, offset)
        except UNREADABLE as error:
            raise UserError(f"source.uri: the labels in {file.key} are truncated or damaged ({error}).") from error

    def _header(self, file: HashedFile) -> tuple[tuple[int, ...], int]:
        """(shape, bytes of the header) of an IDX file of bytes."""
        try:
            with file.unchanged(), _open_idx(file) as stream:
                zero, kind, dimensions = struct.unpack(">HBB", stream.read(4))
                shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
        except UNREADABLE as error:
            raise UserError(
                f"source.uri: {file.key} is not an IDX file: its header cannot be read ({error})."
            ) from error
        if zero != 0 or kind != 8:
            raise UserError(
                f"source.uri: {file.key} is not an IDX file of unsigned bytes (it begins {zero:04x} {kind:02x})."
            )
        return shape, 4 + 4 * dimensions


def _open_idx(file: HashedFile) -> AbstractContextManager[Any]:
    stream: Any = buffered(file.place.open(file.key))
    return gzip.GzipFile(fileobj=stream) if file.key.endswith(".gz") else stream
