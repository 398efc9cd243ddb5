"""A dataset version on disk: Parquet shards of raw pixels, a manifest that commits them, and a reader.

Images are raw uint8 in height, width, channel order, one `fixed_size_binary[H*W*C]` a row: there is nothing to decode
at training time, and a shard's pixels are one buffer that numpy and torch can view. A directory without `manifest.json`
is not a dataset: the manifest is written last and is the commit.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_core.config import UserError, digest
from diffusion_core.data.config import DatasetConfig
from diffusion_core.store import Directory, layout

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")  # in the order in which they stand in a dataset

Shape = tuple[int, int, int]  # height, width, channels
Record = dict[str, Any]  # of one shard: file, split, rows, bytes, sha256, memory_bytes


@dataclass(frozen=True)
class Batch:
    """Some rows of a dataset.

    images: (N, H, W, C) uint8; labels: (N,) int64, or None without classes; text: N captions, or None without
    captions; keys: where each image came from, or None if not asked for.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    text: list[str | None] | None = None
    keys: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageDataset:
    """A dataset version, opened for reading. Made by `open_dataset`; holds no pixels itself."""

    directory: Directory
    manifest: dict[str, Any]

    @property
    def uri(self) -> str:
        return self.directory.uri

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def version(self) -> str:
        return self.manifest["version"]

    @property
    def image_shape(self) -> Shape:
        """(height, width, channels)"""
        height, width, channels = self.manifest["image_shape"]
        return height, width, channels

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0, 1, 2, ...; empty for a dataset without labels."""
        return self.manifest["class_names"]

    @property
    def has_text(self) -> bool:
        return self.manifest["has_text"]

    @cached_property
    def splits(self) -> dict[str, int]:
        """Rows of each split."""
        return {split: self.manifest["splits"][split] for split in SPLITS if split in self.manifest["splits"]}

    def num_rows(self, split: str) -> int:
        return self.splits.get(split, 0)

    def shards(self, split: str) -> list[Record]:
        """The records of a split's shards, in order. `UserError` if the dataset has no such split."""
        if split not in self.splits:
            raise UserError(f"The dataset {self.uri} has no split {split!r}; it has {', '.join(self.splits)}.")
        return [record for record in self.manifest["shards"] if record["split"] == split]

    def read(self, split: str, limit: int | None = None, offset: int = 0) -> Batch:
        """Rows `offset` to `offset + limit` of a split in the order of its shards; fewer if it ends before."""
        stop = self.num_rows(split) if limit is None else min(self.num_rows(split), offset + limit)
        parts, at = [], 0
        for record in self.shards(split):
            first, last = max(offset - at, 0), min(stop - at, record["rows"])
            if first < last:
                parts.append(_slice(self.read_shard(record), first, last))
            at += record["rows"]
        return _concatenate(parts) if parts else self._empty()

    def read_shard(self, record: Record, with_keys: bool = True) -> Batch:
        """All rows of one shard; the images are a view of the decompressed buffer.

        Raises:
            UserError: the shard is gone, damaged, or not what the manifest says.
        """
        try:
            batch = decode_shard(self.directory.read(record["file"]), with_keys)
        except FileNotFoundError as error:
            raise UserError(f"The dataset {self.uri} is damaged: {record['file']} is missing.") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"The dataset {self.uri} is damaged: {record['file']} cannot be read ({error}).") from error
        if batch.images.shape != (record["rows"], *self.image_shape):
            raise UserError(f"The dataset {self.uri} is damaged: {record['file']} is not what its manifest says.")
        return batch

    def rejected(self) -> list[tuple[str, str]]:
        """(key, reason) of every item of the source that was not taken."""
        table = pq.read_table(pa.BufferReader(self.directory.read(layout.REJECTED)))
        return list(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Every shard's file name with what is wrong with it, None if its bytes are those of the manifest."""
        for record in self.manifest["shards"]:
            try:
                found = hashlib.sha256(self.directory.read(record["file"])).hexdigest()
            except FileNotFoundError:
                yield record["file"], "is missing"
                continue
            yield record["file"], None if found == record["sha256"] else "has other bytes than the manifest says"

    def _empty(self) -> Batch:
        labels = np.zeros(0, np.int64) if self.class_names else None
        return Batch(np.zeros((0, *self.image_shape), np.uint8), labels, [] if self.has_text else None, [])


def open_dataset(uri: str | Directory) -> ImageDataset:
    """Open a dataset version by its URI, `<store>/datasets/<name>/<version>`. Reads the manifest only.

    Raises:
        UserError: there is no dataset version there, or it was written by a newer release.
    """
    directory = uri if isinstance(uri, Directory) else Directory(uri)
    try:
        manifest = directory.read_json(layout.MANIFEST)
    except FileNotFoundError:
        raise UserError(
            f"{directory.uri} is not a dataset version: there is no {layout.MANIFEST}{_hint(directory)}."
        ) from None
    except ValueError as error:
        raise UserError(f"The dataset {directory.uri} is damaged: {layout.MANIFEST} is not JSON ({error}).") from error
    if not isinstance(manifest, dict) or "image_shape" not in manifest:
        raise UserError(f"{directory.uri} is not a dataset version: its {layout.MANIFEST} describes something else.")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"The dataset {directory.uri} has schema version {manifest['schema_version']}, and this release reads "
            f"versions up to {SCHEMA_VERSION}: use a newer release."
        )
    return ImageDataset(directory, manifest)


def encode_shard(batch: Batch) -> bytes:
    """The Parquet file of a shard. The same batch gives the same bytes."""
    rows, *shape = batch.images.shape
    pixels = np.ascontiguousarray(batch.images, np.uint8)
    kind = pa.binary(int(np.prod(shape)))
    columns = {"image": pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(pixels)])}
    if batch.labels is not None:
        columns["label"] = pa.array(batch.labels, pa.int32())
    if batch.text is not None:
        columns["text"] = pa.array(batch.text, pa.string())
    columns["key"] = pa.array(batch.keys if batch.keys is not None else [str(row) for row in range(rows)], pa.string())
    metadata = {"schema_version": str(SCHEMA_VERSION), "image_shape": json.dumps(shape), "image_dtype": "uint8"}
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        row_group_size=max(rows, 1),
        use_dictionary=[name for name in ("label", "text") if name in columns],
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def decode_shard(data: bytes, with_keys: bool = True) -> Batch:
    """The rows of a shard's Parquet file. Pixels are viewed, not copied. Checksums of the pages are verified."""
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    table = file.read([name for name in file.schema_arrow.names if with_keys or name != "key"])
    height, width, channels = json.loads(file.schema_arrow.metadata[b"image_shape"])
    column = table["image"]
    image = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    size = height * width * channels
    pixels = np.frombuffer(image.buffers()[1], np.uint8, len(image) * size, image.offset * size) if len(image) else None
    return Batch(
        images=np.zeros(0, np.uint8).reshape(0, height, width, channels)
        if pixels is None
        else pixels.reshape(len(image), height, width, channels),
        labels=table["label"].to_numpy().astype(np.int64) if "label" in table.column_names else None,
        text=table["text"].to_pylist() if "text" in table.column_names else None,
        keys=table["key"].to_pylist() if with_keys else None,
    )


def commit_shard(directory: Directory, index: int, split: str, batch: Batch) -> Record:
    """Store a shard if it is not there, and return the record of what is stored.

    Of several writers of one shard the first wins, and all of them record its bytes.
    """
    data = encode_shard(batch)
    if not directory.create(layout.dataset_shard(index), data):
        data = directory.read(layout.dataset_shard(index))
        batch = decode_shard(data)
    text_bytes = sum(len((text or "").encode()) for text in batch.text or ())
    return {
        "file": layout.dataset_shard(index),
        "split": split,
        "rows": len(batch),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "memory_bytes": batch.images.nbytes + (8 * len(batch) if batch.labels is not None else 0) + text_bytes,
    }


def commit_dataset(
    directory: Directory,
    *,
    version: str,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    shards: Sequence[Record],
    rejected: Sequence[tuple[str, str]],
    **about: Any,
) -> ImageDataset:
    """Write `rejected.parquet` and then the manifest, which makes the directory a dataset."""
    write_rejected(directory, rejected)
    kept = [record for record in shards if record["rows"]]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "name": directory.uri.rstrip("/").split("/")[-2],
        "version": version,
        "image_shape": list(image_shape),
        "image_dtype": "uint8",
        "class_names": list(class_names),
        "rows": sum(record["rows"] for record in kept),
        "splits": {
            split: sum(record["rows"] for record in kept if record["split"] == split)
            for split in SPLITS
            if any(record["split"] == split for record in kept)
        },
        "shards": kept,
        "rejected": {"file": layout.REJECTED, "rows": len(rejected)},
        "has_text": False,
        **about,
    }
    directory.create_json(layout.MANIFEST, manifest)
    return open_dataset(directory)


def write_rejected(directory: Directory, rejected: Sequence[tuple[str, str]]) -> None:
    """Write key and reason of every item that was not taken, sorted by key."""
    rows = sorted(rejected)
    table = pa.table(
        {
            "key": pa.array([key for key, _ in rows], pa.string()),
            "reason": pa.array([why for _, why in rows], pa.string()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    directory.write(layout.REJECTED, sink.getvalue())


def write_dataset(
    store: str | Directory,
    name: str,
    splits: Mapping[str, Batch],
    class_names: Sequence[str] = (),
    rows_per_shard: int | None = None,
) -> ImageDataset:
    """Make a dataset version from arrays in memory, in the order given (no shuffle, nothing rejected).

    Args:
        store: root of the store; the dataset goes to `<store>/datasets/<name>/<version>`.
        splits: rows of each split, "train", "validation" or "test"; all images of one shape.
        class_names: names of the labels 0, 1, 2, ...; needed if there are labels.

    Raises:
        UserError: unknown split, no rows, images of different shapes, labels outside the classes.
    """
    _check_splits(splits, class_names)
    shape = next(iter(splits.values())).images.shape[1:]
    config = DatasetConfig(name=name, channels=shape[2], rows_per_shard=rows_per_shard)
    rows = config.shard_rows(int(np.prod(shape)))
    version = digest(
        [SCHEMA_VERSION, rows, list(class_names), {split: _content(batch) for split, batch in splits.items()}]
    )
    root = store if isinstance(store, Directory) else Directory(store)
    directory = root / layout.dataset_version(name, version)
    records: list[Record] = []
    for split in SPLITS:
        batch = splits.get(split)
        for first in range(0, len(batch) if batch else 0, rows):
            assert batch is not None
            records.append(commit_shard(directory, len(records), split, _slice(batch, first, first + rows)))
    return commit_dataset(
        directory,
        version=version,
        image_shape=shape,
        class_names=class_names,
        shards=records,
        rejected=[],
        has_text=any(batch.text is not None for batch in splits.values()),
        source={"kind": "arrays"},
    )


def _check_splits(splits: Mapping[str, Batch], class_names: Sequence[str]) -> None:
    if not splits or not any(len(batch) for batch in splits.values()):
        raise UserError("There are no images to make a dataset of.")
    if unknown := set(splits) - set(SPLITS):
        raise UserError(f"The split {min(unknown)!r} is unknown: accepted are {', '.join(SPLITS)}.")
    shapes = {batch.images.shape[1:] for batch in splits.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise UserError(f"Images of one shape (height, width, channels) are needed, and there are {sorted(shapes)}.")
    for split, batch in splits.items():
        if (batch.labels is not None) != bool(class_names):
            raise UserError(f"The split {split!r} has labels without class names, or class names without labels.")
        if batch.labels is not None and not np.isin(batch.labels, np.arange(len(class_names))).all():
            raise UserError(f"The labels of split {split!r} must lie between 0 and {len(class_names) - 1}.")


def _content(batch: Batch) -> list[Any]:
    labels = None if batch.labels is None else np.asarray(batch.labels, np.int64).tobytes()
    parts = (np.ascontiguousarray(batch.images, np.uint8).tobytes(), labels)
    return [None if part is None else hashlib.sha256(part).hexdigest() for part in parts] + [batch.text, batch.keys]


def _slice(batch: Batch, first: int, last: int) -> Batch:
    part = slice(first, last)
    return Batch(
        batch.images[part],
        None if batch.labels is None else batch.labels[part],
        None if batch.text is None else batch.text[part],
        None if batch.keys is None else batch.keys[part],
    )


def _concatenate(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(
        np.concatenate([part.images for part in parts]),
        np.concatenate(labels) if labels else None,
        None if parts[0].text is None else [text for part in parts for text in part.text or ()],
        None if parts[0].keys is None else [key for part in parts for key in part.keys or ()],
    )


def _hint(directory: Directory) -> str:
    """If dataset versions lie below, name one of them."""
    for child in directory.children():
        if (directory / child).exists(layout.MANIFEST):
            return f" (did you mean {directory.uri}/{child}?)"
    return ""
