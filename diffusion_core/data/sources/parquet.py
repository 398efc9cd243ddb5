"""Parquet files in the Hugging Face image layout: `image` {bytes, path} or raw bytes, `label`, `text`, `split`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_core.config import UserError
from diffusion_core.data.config import LabelSource, SourceKind, SplitSource
from diffusion_core.data.shards import SPLITS
from diffusion_core.data.sources.base import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    UNKNOWN,
    Item,
    Reader,
    Scan,
    Source,
    class_numbers,
    label_gaps,
    split_in,
    split_named,
)
from diffusion_core.data.sources.hashed import HashedFile
from diffusion_core.data.sources.listing import SourceFile, suffix
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.patience import StoreUnavailable
from diffusion_core.storage import Directory

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "jpeg", "webp")
_BATCH_ROWS = 128  # rows decoded at a time; a row group may be larger than memory
_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class _File:
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
    place: Directory
    files: tuple[_File, ...]

    def key(self, item: int) -> str:
        file = self.files[int(np.searchsorted([file.first for file in self.files], item, side="right")) - 1]
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
        order = np.argsort(items, kind="stable")
        for file in self.files:
            low, high = np.searchsorted(items[order], (file.first, file.first + file.rows))
            if low < high:
                slots = order[low:high]
                yield from self._read_file(file, slots, items[slots] - file.first)

    def _read_file(self, file: _File, slots: np.ndarray, rows: np.ndarray) -> Iterator[Item]:
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
        self, parquet: pq.ParquetFile, file: _File, group: int, start: int, slots: np.ndarray, rows: np.ndarray
    ) -> Iterator[Item]:
        columns = [file.image] + ([file.text] if file.text else [])
        at, done = start, 0
        try:
            for batch in parquet.iter_batches(_BATCH_ROWS, [group], columns):
                stop = int(np.searchsorted(rows, at + len(batch)))
                yield from self._items(file, batch, at, slots[done:stop], rows[done:stop])
                at, done = at + len(batch), stop
        except MemoryError:  # Arrow's is also an ArrowException; it says nothing about the file
            raise
        except (pa.ArrowException, OSError) as error:
            if not self.place.is_local:  # it may be the network, and a reject would be for ever
                raise
            reason = f"row group {group} cannot be read: {error}"
            for slot, row in zip(slots[done:], rows[done:], strict=True):
                yield Item(int(slot), f"{file.key}#{row}", RejectedItem(reason))

    def _items(
        self, file: _File, batch: pa.RecordBatch, at: int, slots: np.ndarray, rows: np.ndarray
    ) -> Iterator[Item]:
        image, text = batch.column(file.image), batch.column(file.text) if file.text else None
        for slot, row in zip(slots, rows, strict=True):
            value = image[int(row) - at].as_py()
            content = value.get("bytes") if isinstance(value, dict) else value
            if content is None:
                path = value.get("path") if isinstance(value, dict) else None
                content = RejectedItem(f"no image bytes, only the path {path}" if path else "no image: null")
            caption = text[int(row) - at].as_py() if text is not None else None
            yield Item(int(slot), f"{file.key}#{row}", content, caption)


class ParquetSource(Source):
    kind = SourceKind.PARQUET

    def needs_hash(self, file: SourceFile) -> bool:
        return file.problem is None and suffix(file.key) == ".parquet"

    def scan(self, digests: dict[str, str]) -> Scan:
        files: list[_File] = []
        rejected: list[tuple[str, str]] = [(file.key, file.problem) for file in self.files if file.problem]
        labels: list[tuple[list[Any], np.ndarray]] = []
        splits: list[np.ndarray] = []
        first = 0
        for hashed in self.hashed(digests):
            try:
                with hashed.unchanged(), self.place.open(hashed.key) as stream:
                    parquet = pq.ParquetFile(stream)
                    file = self._describe(hashed, parquet, first)
                    columns = self._read_columns(parquet, file)
            except (MemoryError, StoreUnavailable):
                raise
            except (pa.ArrowException, OSError) as error:
                rejected.append((hashed.key, f"not a readable Parquet file: {error}"))
                continue
            files.append(file)
            labels.append(columns[0])
            splits.append(columns[1])
            first += file.rows
        if not first:
            why = f": {rejected[0][0]} is {rejected[0][1]}" if rejected else ""
            raise UserError(f"source.uri: {self.config.uri} holds no Parquet rows{why}.")
        return self._scan(files, labels, np.concatenate(splits), rejected)

    def _scan(
        self,
        files: list[_File],
        columns: list[tuple[list[Any], np.ndarray]],
        splits: np.ndarray,
        rejected: list[tuple[str, str]],
    ) -> Scan:
        reader = ParquetReader(self.place, tuple(files))
        labels, names = self._labels(files, columns)
        alive = np.flatnonzero(splits != _OTHER_SPLIT)
        odd = [
            (reader.key(int(item)), "its split is none of train, validation, test")
            for item in np.flatnonzero(splits == _OTHER_SPLIT)
        ]
        labels, alive, gaps = label_gaps(labels, alive, reader)
        lost = len(rejected) * max(1, len(splits) // len(files))  # a lost file counts as many images as the others hold
        return Scan(
            reader=reader,
            labels=labels,
            splits=np.where(splits == _OTHER_SPLIT, UNKNOWN, splits).astype(np.int8),
            candidates=alive,
            class_names=names if labels is not None else [],
            has_text=any(file.text for file in files),
            rejected=[*rejected, *odd, *gaps],
            rejected_images=lost + len(odd) + len(gaps),
        )

    def _labels(
        self, files: list[_File], columns: list[tuple[list[Any], np.ndarray]]
    ) -> tuple[np.ndarray | None, list[str]]:
        if self.config.labels in (LabelSource.CLASS_FOLDERS, LabelSource.METADATA):
            raise UserError(f"source.labels: {self.config.labels.value} is for folders of images; Parquet has column.")
        if self.config.labels is LabelSource.NONE or not any(file.label for file in files):
            if self.config.labels is LabelSource.COLUMN:
                raise UserError(f"source.labels: {self.config.uri} has no column {' or '.join(LABEL_COLUMNS)}.")
            return None, []
        everything = [value for distinct, _ in columns for value in distinct]
        declared = next((file.declared for file in files if file.declared), None)
        numbers, names = class_numbers(everything, self.config, declared)
        parts, at = [], 0
        for distinct, which in columns:
            parts.append(numbers[at : at + len(distinct)][which])
            at += len(distinct)
        return np.concatenate(parts), names

    def _describe(self, hashed: HashedFile, parquet: pq.ParquetFile, first: int) -> _File:
        key, schema, metadata = hashed.key, parquet.schema_arrow, parquet.metadata
        label = _column(key, "label", schema, self.config.label_column, LABEL_COLUMNS)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return _File(
            hashed=hashed,
            image=self._image_column(key, schema),
            label=None if self.config.labels is LabelSource.NONE else label,
            text=_column(key, "text", schema, self.config.text_column, TEXT_COLUMNS),
            split=_column(key, "split", schema, self.config.split_column, ("split",)),
            declared=_class_label(schema, label),
            first=first,
            group_rows=tuple(group.num_rows for group in groups),
            group_bytes=tuple(group.total_byte_size for group in groups),
        )

    def _image_column(self, key: str, schema: pa.Schema) -> str:
        fitting = [field.name for field in schema if _holds_images(field.type)]
        named = self.config.image_column
        if named and named not in schema.names:
            raise UserError(f"source.image_column: {named} is not in {key}; its columns are {', '.join(schema.names)}.")
        if named and named not in fitting:
            raise UserError(f"source.image_column: {named} of {key} is {schema.field(named).type}, not image bytes.")
        usual = [name for name in IMAGE_COLUMNS if name in fitting]
        if not named and not usual and len(fitting) != 1:
            raise UserError(
                f"source.uri: {key} has no image column that can be told from its columns {', '.join(schema.names)}: "
                "name it in source.image_column."
            )
        return named or (usual or fitting)[0]

    def _read_columns(self, parquet: pq.ParquetFile, file: _File) -> tuple[tuple[list[Any], np.ndarray], np.ndarray]:
        """((different labels, which of them each row has), split number of each row)."""
        wanted = [name for name in (file.label, file.split) if name]
        table = parquet.read(wanted) if wanted else None
        nothing = np.zeros(file.rows, np.int64)
        label = ([None], nothing) if table is None or not file.label else _distinct(table[file.label])
        if self.config.splits is SplitSource.NONE:
            return label, np.full(file.rows, UNKNOWN, np.int8)
        if table is None or not file.split:
            named = split_in(file.key)
            return label, np.full(file.rows, SPLITS.index(named) if named else UNKNOWN, np.int8)
        values, which = _distinct(table[file.split])
        numbers = [UNKNOWN if value is None else _split_number(str(value)) for value in values]
        return label, np.array(numbers, np.int8)[which]


_OTHER_SPLIT = -2  # a split that is none of train, validation, test


def _split_number(value: str) -> int:
    named = split_named(value)
    return SPLITS.index(named) if named else _OTHER_SPLIT


def _distinct(column: pa.ChunkedArray) -> tuple[list[Any], np.ndarray]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _column(key: str, what: str, schema: pa.Schema, named: str | None, usual: tuple[str, ...]) -> str | None:
    if named and named not in schema.names:
        raise UserError(f"source.{what}_column: {named} is not in {key}; its columns are {', '.join(schema.names)}.")
    return named or next((name for name in usual if name in schema.names), None)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _class_label(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """Class names that Hugging Face `datasets` has written into the schema."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        feature = json.loads(raw)["info"]["features"][label] if raw and label else {}
        names = feature.get("names")
        return tuple(str(name) for name in names) if feature.get("_type") == "ClassLabel" and names else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # somebody else's metadata; the numbers themselves become the names
