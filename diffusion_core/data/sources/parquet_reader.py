"""Reading the images of Parquet files, in pieces that fit into memory, and of the files that their rows name."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffusion_core.data.sources.base import Item, Reader, by_part, part_of
from diffusion_core.data.sources.hashed import HashedFile, read_each
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.store import Directory

_BATCH_ROWS = 128  # rows decoded at a time; a row group may be larger than memory
_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class ImageTable:
    """One Parquet file: its columns, and where its items and row groups begin."""

    hashed: HashedFile
    image: str
    label: str | None
    text: str | None
    split: str | None
    declared: tuple[str, ...] | None  # names of a ClassLabel
    first: int  # number of its first item
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]

    @property
    def key(self) -> str:
        return self.hashed.key

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True)
class ParquetReader(Reader):
    """named: SHA-256 by key of every image file that a row names instead of holding bytes, or why it cannot be read."""

    place: Directory
    files: tuple[ImageTable, ...]
    named: dict[str, str | RejectedItem] = field(default_factory=dict)
    named_bytes: int = 0

    @property
    def random_access(self) -> bool:
        """If nearly all there is to read lies in image files."""
        return self.named_bytes > sum(file.hashed.listed.size for file in self.files)

    def key(self, item: int) -> str:
        file = part_of(item, self.files)
        return f"{file.key}#{item - file.first}"

    def chunks(self) -> list[range]:
        """Whole row groups, of about 128 MiB together."""
        chunks: list[range] = []
        for file in self.files:
            first, size, item = file.first, 0, file.first
            for rows, group_bytes in zip(file.group_rows, file.group_bytes, strict=True):
                if size and size + group_bytes > _CHUNK_BYTES:
                    chunks.append(range(first, item))
                    first, size = item, 0
                item, size = item + rows, size + group_bytes
            if item > first:
                chunks.append(range(first, item))
        return chunks

    def read(self, items: np.ndarray) -> Iterator[Item]:
        for file, slots, rows in by_part(items, self.files):
            yield from self._read_file(file, slots, rows)

    def _read_file(self, file: ImageTable, slots: np.ndarray, rows: np.ndarray) -> Iterator[Item]:
        """`rows` (sorted) of one file."""
        with file.hashed.unchanged(), self.place.open(file.key) as stream:
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            start = 0
            for group, count in enumerate(file.group_rows):
                low, high = np.searchsorted(rows, (start, start + count))
                if low < high:
                    yield from self._read_group(parquet, file, group, start, slots[low:high], rows[low:high])
                start += count

    def _read_group(
        self, parquet: pq.ParquetFile, file: ImageTable, group: int, start: int, slots: np.ndarray, rows: np.ndarray
    ) -> Iterator[Item]:
        """`rows` (sorted) of one row group, which begins at row `start`."""
        at, done = start, 0
        for batch in self._batches(parquet, group, [file.image, file.text] if file.text else [file.image]):
            if isinstance(batch, RejectedItem):
                for slot, row in zip(slots[done:], rows[done:], strict=True):
                    yield Item(int(slot), f"{file.key}#{row}", batch)
                return
            stop = int(np.searchsorted(rows, at + len(batch)))
            wanted = batch.take(pa.array(rows[done:stop] - at))
            texts = wanted.column(file.text).to_pylist() if file.text else [None] * len(wanted)
            contents = self._contents(file, wanted.column(file.image))
            for slot, row, content, text in zip(slots[done:stop], rows[done:stop], contents, texts, strict=True):
                yield Item(int(slot), f"{file.key}#{row}", content, text)
            at, done = at + len(batch), stop

    def _batches(
        self, parquet: pq.ParquetFile, group: int, columns: list[str]
    ) -> Iterator[pa.RecordBatch | RejectedItem]:
        """Some rows after the other; in the end the reason why no more can be read, if there is one."""
        try:
            yield from parquet.iter_batches(_BATCH_ROWS, [group], columns)
        except MemoryError:  # Arrow's is also an ArrowException; it says nothing about the file
            raise
        except (pa.ArrowException, OSError) as error:
            yield RejectedItem(f"row group {group} cannot be read: {error}")

    def _contents(self, file: ImageTable, images: pa.Array) -> Iterator[bytes | RejectedItem]:
        """The encoded images of some rows, from the column or from the files that it names."""
        cells = [cell if isinstance(cell, dict) else {"bytes": cell} for cell in (image.as_py() for image in images)]
        outside = [self._outside(file, cell.get("path")) if cell["bytes"] is None else None for cell in cells]
        named = read_each(self.place, [place for place in outside if isinstance(place, tuple)])
        for cell, place in zip(cells, outside, strict=True):
            if place is None:
                yield cell["bytes"]
            else:
                yield next(named) if isinstance(place, tuple) else place

    def _outside(self, file: ImageTable, path: str | None) -> tuple[str, str] | RejectedItem:
        """Key and SHA-256 of the image file that a row without bytes names."""
        if not path:
            return RejectedItem("no image: null")
        key = key_beside(file.key, path)
        found = self.named.get(key) if key else None
        if found is None:
            return RejectedItem(f"no image bytes, only the path {path}, where no file is")
        return found if isinstance(found, RejectedItem) else (str(key), found)


def named_files(parquet: pq.ParquetFile, key: str, image: str) -> Iterator[str]:
    """Keys of the files that rows without bytes name. If its statistics say that no row lacks bytes, none is read.

    Args:
        key: of the Parquet file; image: name of its image column.
    """
    leaves = [parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)]
    pair = [f"{image}.bytes", f"{image}.path"]
    if not set(pair) <= set(leaves):
        return
    for group in range(parquet.metadata.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(leaves.index(pair[0])).statistics
        if statistics is not None and statistics.has_null_count and not statistics.null_count:
            continue
        for batch in parquet.iter_batches(_BATCH_ROWS, [group], pair):
            lacking = batch.column(0).filter(pc.is_null(pc.struct_field(batch.column(0), "bytes")))
            for path in pc.struct_field(lacking, "path").to_pylist():
                if path and (found := key_beside(key, path)):
                    yield found


def key_beside(key: str, path: str) -> str | None:
    """The key of what a path, relative to a file's own folder, leads to; None if it leads out of the source."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(key), path))
    return None if found.startswith("/") or found.split("/")[0] in (".", "..") or "\0" in found else found
