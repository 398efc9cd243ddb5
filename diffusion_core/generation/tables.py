"""The tables and records that go with the images of a set. Each is a function of its arguments, bytes included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffusion_core.generation.formats import ShardContent, data_digest, pixel_digest, write_parquet
from diffusion_core.generation.labels import Labels
from diffusion_core.generation.plan import SCHEMA_VERSION, Extension, Shard, ShardOutcome


def plan(shards: Sequence[Shard], labels: Labels) -> bytes:
    """`plan-<first id>.parquet`: one row per shard with its image ids, the class of each, and its output key."""
    columns = _shard_columns(shards) | {"key": pa.array([shard.key for shard in shards], pa.string())}
    if labels.num_classes:
        lists = [labels.of(np.arange(shard.first_image_id, shard.stop)) for shard in shards]
        columns["labels"] = pa.array(lists, pa.list_(pa.int64()))
    return write_parquet(pa.table(columns))


def index(shards: Sequence[Shard], records: Sequence[Mapping[str, Any]], labels: Labels, seed: int) -> bytes:
    """`index-<last id>.parquet`: one row per image with its shard, class, seed and the digest of its pixels."""
    ids = np.concatenate([np.arange(shard.first_image_id, shard.stop, dtype=np.int64) for shard in shards])
    numbers = np.repeat([shard.number for shard in shards], [shard.count for shard in shards])
    columns = {"image_id": pa.array(ids), "shard": pa.array(numbers, pa.int64())}
    classes = labels.of(ids)
    if classes is not None:
        columns["label"] = pa.array(classes, pa.int64())
    columns["seed"] = pa.array(np.full(len(ids), seed, dtype=np.int64))
    columns["sha256"] = pa.array([sha256 for record in records for sha256 in record["images"]], pa.string())
    return write_parquet(pa.table(columns))


def failures(failed: Iterable[ShardOutcome]) -> bytes:
    """`failed.parquet`: one row per shard that could not be made, with its error and the attempts that were made."""
    rows = sorted(failed, key=lambda row: row.shard.number)
    columns = _shard_columns([row.shard for row in rows])
    columns["error"] = pa.array([row.error for row in rows], pa.string())
    columns["attempts"] = pa.array([row.attempts for row in rows], pa.int64())
    return write_parquet(pa.table(columns))


def commit_record(shard: Shard, key: str, files: dict[str, bytes], content: ShardContent) -> dict[str, Any]:
    """What the commit record of a shard says of its data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "shard": shard.number,
        "key": key,
        "first_image_id": shard.first_image_id,
        "count": shard.count,
        "bytes": sum(map(len, files.values())),
        "sha256": data_digest(files),
        "images": [pixel_digest(image) for image in content.images],
    }


def manifest(
    extension: Extension,
    records: Sequence[Mapping[str, Any]],
    labels: Labels,
    class_names: Sequence[str],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """What `manifest-<last id>.json` says besides the description of the set; `digests` by key of plan and index."""
    classes = labels.of(np.arange(extension.first_image_id, extension.stop))
    counts = [] if classes is None else np.bincount(classes, minlength=len(class_names)).tolist()
    shard_fields = ("shard", "key", "first_image_id", "count", "bytes", "sha256")
    return {
        "schema_version": SCHEMA_VERSION,
        "model_versions": sorted({record["model_version"] for record in records}),
        "first_image_id": extension.first_image_id,
        "last_image_id": extension.stop - 1,
        "images": extension.count,
        "images_per_class": dict(zip(class_names, counts, strict=True)),
        "plan": {"key": extension.plan_key, "sha256": digests[extension.plan_key]},
        "index": {"key": extension.index_key, "sha256": digests[extension.index_key]},
        "shards": [{name: record[name] for name in shard_fields} for record in records],
    }


def _shard_columns(shards: Sequence[Shard]) -> dict[str, pa.Array]:
    return {
        "shard": pa.array([shard.number for shard in shards], pa.int64()),
        "first_image_id": pa.array([shard.first_image_id for shard in shards], pa.int64()),
        "count": pa.array([shard.count for shard in shards], pa.int64()),
    }
