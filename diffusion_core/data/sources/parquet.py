"""Parquet files in the Hugging Face image layout: `image` {bytes, path} or raw bytes, `label`, `text`, `split`.

A row without bytes names an image file, by its path relative to the Parquet file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_core.config import UserError
from diffusion_core.data.config import LabelSource, SourceKind, SplitSource
from diffusion_core.data.shards import SPLITS
from diffusion_core.data.sources.base import Scan, Source
from diffusion_core.data.sources.hashed import HashedFile
from diffusion_core.data.sources.labels import (
    UNKNOWN,
    USUAL_COLUMNS,
    class_numbers,
    find_column,
    label_gaps,
    split_in,
    split_named,
)
from diffusion_core.data.sources.listing import IMAGE_SUFFIXES, SourceFile, look, suffix
from diffusion_core.data.sources.parquet_reader import ImageTable, ParquetReader, named_files
from diffusion_core.data.transforms import RejectedItem

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "jpeg", "webp")
_LOOKS = 32  # files looked for at once

Labels = tuple[list[Any], np.ndarray]  # the different values, and which of them each row has


class ParquetSource(Source):
    kind = SourceKind.PARQUET

    _named: frozenset[str] = frozenset()  # keys of the image files that rows name

    def complete(self) -> None:
        listed = {file.key: file for file in self.files}
        if len(listed) > 1 and not any(suffix(key) in IMAGE_SUFFIXES for key in listed):
            return  # a folder that holds no image: no Parquet file has to be opened, on S3 say, to know all files
        named = {key for file in self.files if self._is_table(file) for key in self._named_in(file.key)}
        with ThreadPoolExecutor(_LOOKS) as threads:
            found = list(threads.map(lambda key: listed.get(key) or look(self.place, key), sorted(named)))
        images = {file.key: file for file in found if file is not None}
        self._named = frozenset(images)
        self.files = sorted((listed | images).values(), key=lambda file: file.key)

    def needs_hash(self, file: SourceFile) -> bool:
        return self._is_table(file) or (file.problem is None and self.is_image(file))

    def is_image(self, file: SourceFile) -> bool:
        return file.key in self._named

    def scan(self, digests: dict[str, str]) -> Scan:
        files: list[ImageTable] = []
        rejected = [(file.key, file.problem) for file in self.files if file.problem and not self.is_image(file)]
        labels: list[Labels] = []
        splits: list[np.ndarray] = []
        first = 0
        for hashed in self.hashed(digests):
            if not self._is_table(hashed.listed):
                continue
            try:
                with hashed.unchanged(), self.place.open(hashed.key) as stream:
                    parquet = pq.ParquetFile(stream)
                    file = self._describe(hashed, parquet, first)
                    columns = self._read_columns(parquet, file)
            except MemoryError:
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
        return self._scan(self._reader(files, digests), labels, np.concatenate(splits), rejected)

    def _is_table(self, file: SourceFile) -> bool:
        return file.problem is None and suffix(file.key) == ".parquet"

    def _named_in(self, key: str) -> set[str]:
        try:
            with self.place.open(key) as stream:
                parquet = pq.ParquetFile(stream)
                return set(named_files(parquet, key, self._image_column(key, parquet.schema_arrow)))
        except MemoryError:
            raise
        except (pa.ArrowException, OSError):
            return set()  # the scan says what is wrong with it

    def _reader(self, files: list[ImageTable], digests: dict[str, str]) -> ParquetReader:
        images = [file for file in self.files if self.is_image(file)]
        named = {file.key: RejectedItem(file.problem) if file.problem else digests[file.key] for file in images}
        return ParquetReader(self.place, tuple(files), named, sum(file.size for file in images))

    def _scan(
        self,
        reader: ParquetReader,
        columns: list[Labels],
        splits: np.ndarray,
        rejected: list[tuple[str, str]],
    ) -> Scan:
        files = reader.files
        labels, names = self._labels(files, columns)
        alive = np.flatnonzero(splits != _OTHER_SPLIT)
        odd = [
            (reader.key(int(item)), "its split is none of train, validation, test")
            for item in np.flatnonzero(splits == _OTHER_SPLIT)
        ]
        labels, alive, gaps = label_gaps(labels, alive, reader.key)
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

    def _labels(self, files: Sequence[ImageTable], columns: list[Labels]) -> tuple[np.ndarray | None, list[str]]:
        if self.config.labels in (LabelSource.CLASS_FOLDERS, LabelSource.METADATA):
            raise UserError(f"source.labels: {self.config.labels.value} is for folders of images; Parquet has column.")
        if self.config.labels is LabelSource.NONE or not any(file.label for file in files):
            if self.config.labels is LabelSource.COLUMN:
                raise UserError(
                    f"source.labels: {self.config.uri} has no column {' or '.join(USUAL_COLUMNS['label'])}."
                )
            return None, []
        everything = [value for distinct, _ in columns for value in distinct]
        declared = next((file.declared for file in files if file.declared), None)
        if other := next((file for file in files if file.declared not in (None, declared)), None):
            raise UserError(f"source.uri: {other.key} declares other class names than the files before it.")
        numbers, names = class_numbers(everything, self.config, declared)
        parts, at = [], 0
        for distinct, which in columns:
            parts.append(numbers[at : at + len(distinct)][which])
            at += len(distinct)
        return np.concatenate(parts), names

    def _describe(self, hashed: HashedFile, parquet: pq.ParquetFile, first: int) -> ImageTable:
        key, schema, metadata = hashed.key, parquet.schema_arrow, parquet.metadata
        label = find_column("label", self.config, key, schema.names)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return ImageTable(
            hashed=hashed,
            image=self._image_column(key, schema),
            label=None if self.config.labels is LabelSource.NONE else label,
            text=find_column("text", self.config, key, schema.names),
            split=find_column("split", self.config, key, schema.names),
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

    def _read_columns(self, parquet: pq.ParquetFile, file: ImageTable) -> tuple[Labels, np.ndarray]:
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
