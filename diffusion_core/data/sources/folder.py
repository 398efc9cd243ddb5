"""A folder of image files, as `torchvision` and Hugging Face lay it out.

Class sub-folders give labels; split-named top folders (train, test, ...) give splits if all top folders are so named;
a `metadata.csv` or `metadata.jsonl` beside the images, with a column `file_name`, gives labels, captions and splits.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from diffusion_core.config import UserError
from diffusion_core.data.config import LabelSource, SourceKind, SplitSource
from diffusion_core.data.sources.base import Item, Reader, Scan, Source
from diffusion_core.data.sources.hashed import read_each, read_hashed
from diffusion_core.data.sources.labels import (
    USUAL_COLUMNS,
    class_numbers,
    distinct_values,
    find_column,
    label_gaps,
    split_named,
    split_numbers,
)
from diffusion_core.data.sources.listing import IMAGE_SUFFIXES, SourceFile, suffix
from diffusion_core.store import Directory

METADATA = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class FolderReader(Reader):
    """keys: Arrow string array; sha256: fixed_size_binary[32], what each file held when it was hashed."""

    place: Directory
    keys: pa.Array
    sha256: pa.Array
    text: pa.Array | None

    @property
    def random_access(self) -> bool:
        return True

    def key(self, item: int) -> str:
        return self.keys[item].as_py()

    def read(self, items: np.ndarray) -> Iterator[Item]:
        files = [(self.key(item), self.sha256[item].as_py().hex()) for item in items.tolist()]
        for slot, content in enumerate(read_each(self.place, files)):
            text = None if self.text is None else self.text[int(items[slot])].as_py()
            yield Item(slot, files[slot][0], content, text)


@dataclass(frozen=True)
class _Row:
    """What a metadata file says of one image."""

    label: Any = None
    text: str | None = None
    split: str | None = None


class FolderSource(Source):
    kind = SourceKind.FOLDER

    def needs_hash(self, file: SourceFile) -> bool:
        return file.problem is None and (self.is_image(file) or _is_metadata(file.key))

    def is_image(self, file: SourceFile) -> bool:
        return suffix(file.key) in IMAGE_SUFFIXES

    def scan(self, digests: dict[str, str]) -> Scan:
        rejected = [(file.key, f"not an image file: {suffix(file.key) or 'no suffix'}") for file in self._others()]
        broken = [(file.key, file.problem) for file in self.files if file.problem]
        keys = [file.key for file in self.files if file.problem is None and self.is_image(file)]
        rows, odd = self._metadata(set(keys), digests)
        if not keys:
            raise UserError(f"source.uri: {self.config.uri} holds no image file ({len(self.files)} other files).")
        splits, folders = self._splits_and_classes(keys)
        unnamed = set() if rows is None else {key for key in keys if key not in rows}
        odd += [(key, "not named in the metadata file") for key in unnamed]
        reader = FolderReader(
            place=self.place,
            keys=pa.array(keys, pa.large_string()),
            sha256=pa.array([bytes.fromhex(digests[key]) for key in keys], pa.binary(32)),
            text=self._texts(keys, rows),
        )
        if rows is not None and any(row.split for row in rows.values()):
            splits = [rows[key].split if key in rows else None for key in keys]
        alive = np.array([item for item, key in enumerate(keys) if key not in unnamed], np.int64)
        labels, names = self._labels(keys, folders, rows)
        labels, alive, gaps = label_gaps(labels, alive, reader.key)
        images = [*broken, *odd, *gaps]
        return Scan(
            reader=reader,
            labels=labels,
            splits=split_numbers(splits),
            candidates=alive,
            class_names=names if labels is not None else [],
            has_text=reader.text is not None,
            rejected=rejected + images,
            rejected_images=len(images),
        )

    def _others(self) -> list[SourceFile]:
        return [
            file
            for file in self.files
            if file.problem is None and not self.is_image(file) and not _is_metadata(file.key)
        ]

    def _splits_and_classes(self, keys: Sequence[str]) -> tuple[list[str | None], list[str]]:
        """Of each image the split (None if unsaid) and the class folder ("" for an image outside all of them)."""
        paths = [key.split("/") for key in keys]
        top = {path[0] if len(path) > 1 else "" for path in paths}
        split_folders = self.config.splits is SplitSource.AUTO and all(split_named(folder) for folder in top)
        splits = [split_named(path[0]) if split_folders else None for path in paths]
        below = [path[1:] if split_folders else path for path in paths]
        return splits, [path[0] if len(path) > 1 else "" for path in below]

    def _labels(
        self, keys: Sequence[str], folders: Sequence[str], rows: dict[str, _Row] | None
    ) -> tuple[np.ndarray | None, list[str]]:
        wanted = self.config.labels
        if wanted is LabelSource.AUTO:
            wanted = LabelSource.METADATA if rows is not None else LabelSource.CLASS_FOLDERS
            if rows is None and len({folder for folder in folders if folder}) < 2:
                return None, []  # one folder of images is a place, not a class
        if wanted is LabelSource.NONE:
            return None, []
        if wanted is LabelSource.CLASS_FOLDERS:
            values: list[Any] = list(folders)
        elif wanted is LabelSource.METADATA:
            values = [rows[key].label if rows and key in rows else None for key in keys]
        else:
            raise UserError(
                "source.labels: column is for Parquet, IDX and .npz; a folder has class_folders or metadata."
            )
        if self.config.labels is not LabelSource.AUTO and not any(value not in (None, "") for value in values):
            raise UserError(f"source.labels: {wanted.value} gives no label: no image of {self.config.uri} has one.")
        distinct, which = distinct_values(values)
        numbers, names = class_numbers(distinct, self.config)
        return numbers[which], names

    def _texts(self, keys: Sequence[str], rows: dict[str, _Row] | None) -> pa.Array | None:
        if rows is None or all(row.text is None for row in rows.values()):
            return None
        return pa.array([rows[key].text if key in rows else None for key in keys], pa.large_string())

    def _metadata(
        self, keys: set[str], digests: dict[str, str]
    ) -> tuple[dict[str, _Row] | None, list[tuple[str, str]]]:
        """Rows by image key, and what is wrong with some; None without a metadata file."""
        files = [file.key for file in self.files if file.problem is None and _is_metadata(file.key)]
        if not files:
            return None, []
        rows: dict[str, _Row] = {}
        odd: list[tuple[str, str]] = []
        for file in files:
            for name, row in self._read_metadata(file, digests[file]):
                key = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
                if key not in keys:
                    odd.append((key, f"named in {file}, but there is no such image file"))
                elif key in rows:
                    odd.append((key, f"named twice in {file}; the first row counts"))
                else:
                    rows[key] = row
        return rows, odd

    def _read_metadata(self, key: str, sha256: str) -> Iterator[tuple[str, _Row]]:
        try:
            text = read_hashed(self.place, key, sha256).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"source.uri: {key} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        columns: dict[str, str | None] | None = None
        for number, fields in _table_rows(key, text):
            if columns is None:
                columns = self._columns(key, fields)
            name = fields.get("file_name")
            if not isinstance(name, str) or not name:
                raise UserError(f"source.uri: {key}, line {number}: file_name is missing.")
            found = {what: fields.get(column) if column else None for what, column in columns.items()}
            split = None if self.config.splits is SplitSource.NONE else split_named(str(found["split"] or ""))
            yield name, _Row(found["label"], None if found["text"] in (None, "") else str(found["text"]), split)

    def _columns(self, key: str, fields: dict[str, Any]) -> dict[str, str | None]:
        """Which column of a metadata file holds labels, captions and splits."""
        if "file_name" not in fields:
            raise UserError(f"source.uri: {key} has no column file_name; its columns are {', '.join(fields)}.")
        return {what: find_column(what, self.config, key, fields) for what in USUAL_COLUMNS}


def _is_metadata(key: str) -> bool:
    return posixpath.basename(key) in METADATA


def _table_rows(key: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields of every row of a .csv or .jsonl file."""
    if key.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            if None in row:
                raise UserError(f"source.uri: {key}, line {reader.line_num}: more fields than the header has.")
            yield reader.line_num, row
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"source.uri: {key}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UserError(f"source.uri: {key}, line {number}: a JSON object is needed.")
        yield number, row
