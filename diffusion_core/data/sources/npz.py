"""NumPy's .npz archives of images and labels."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import SourceKind
from diffusion_core.data.sources.arrays import UNREADABLE, ArrayReader, ArraySource, ImageArray, buffered, checked_shape
from diffusion_core.data.sources.base import Scan
from diffusion_core.data.sources.hashed import HashedFile
from diffusion_core.data.sources.listing import SourceFile, suffix


class NpzReader(ArrayReader):
    @contextmanager
    def open(self, array: ImageArray) -> Iterator[IO[bytes]]:
        with (
            buffered(self.place.open(array.file.key)) as file,
            zipfile.ZipFile(file) as archive,
            archive.open(f"{array.member}.npy") as stream,
        ):
            yield stream


class NpzSource(ArraySource):
    """`images` and `labels`, or `x_train`, `y_train`, `x_test`, `y_test`, or `train_images`, `train_labels`, ..."""

    kind = SourceKind.NPZ

    def needs_hash(self, file: SourceFile) -> bool:
        return file.problem is None and suffix(file.key) == ".npz"

    def scan(self, digests: dict[str, str]) -> Scan:
        arrays: list[ImageArray] = []
        labels: list[np.ndarray | None] = []
        for file in self.hashed(digests):
            try:
                with (
                    file.unchanged(),
                    buffered(self.place.open(file.key)) as stream,
                    np.load(stream, allow_pickle=False) as archive,
                ):
                    self._add(file, archive, arrays, labels)
            except UNREADABLE as error:
                raise UserError(f"source.uri: {file.key} is not a readable .npz archive ({error}).") from error
        if not arrays:
            raise UserError(f"source.uri: {self.config.uri} holds no readable .npz archive.")
        return self._scan(NpzReader(self.place, tuple(arrays)), arrays, labels)

    def _add(
        self, file: HashedFile, archive: np.lib.npyio.NpzFile, arrays: list[ImageArray], labels: list[np.ndarray | None]
    ) -> None:
        key = file.key
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
            first = sum(array.rows for array in arrays)
            shape = checked_shape(f"{images} of {key}", shape, size - offset)
            arrays.append(ImageArray(file, images, shape, offset, first, split))
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
