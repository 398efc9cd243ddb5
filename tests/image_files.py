"""Sources of images for tests: written to disk as users write them, good ones and every kind of broken one."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.data.hashing import HashCache, dataset_version, digests_of, hash_files
from diffusion_core.data.sharding import check_rejected, make_plan, make_shard
from diffusion_core.data.shards import SPLITS, ImageDataset, commit_dataset
from diffusion_core.data.sources import open_source
from diffusion_core.store import Directory


def pixels(seed: int, height: int = 12, width: int = 12, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8 noise, without the last axis for one channel."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[:, :, 0] if channels == 1 else values


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def write_images(folder: Path, names: list[str], size: int = 12) -> Path:
    """One different PNG for each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(seed, size, size), "JPEG" if name.endswith(".jpg") else "PNG"))
    return folder


def bomb(side: int) -> bytes:
    """A small PNG file that claims to be `side` pixels wide and high."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


BROKEN = {
    "zero.png": (b"", "empty"),
    "text.png": (b"these are words, not pixels\n" * 40, "not an image"),
    "truncated.png": (encoded(pixels(90, 64, 64))[:6000], "damaged"),
    "truncated.jpg": (encoded(pixels(91, 64, 64), "JPEG")[:700], "damaged"),
    "flipped.png": (encoded(pixels(92, 64, 64))[:500] + b"\xff" * 100 + encoded(pixels(92, 64, 64))[600:], "damaged"),
    "bomb.png": (bomb(10_000), "pixels"),
    "huge_bomb.png": (bomb(60_000), "decompression bomb"),
    "small.png": (encoded(pixels(93, 3, 5)), "smaller than 8x8: 5x3"),
    "header_only.gif": (b"GIF89a", "not an image"),
    "float.tiff": (encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "32-bit"),
}


def write_parquet(path: Path, images: list, layout: str = "struct", metadata: dict | None = None, **columns) -> Path:
    """`images`: of each row encoded bytes, None, or the whole cell. Layout "struct" ({bytes, path}) or "binary"."""
    if layout == "struct":
        values = [
            image if isinstance(image, dict) else {"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)
        ]
        table = {"image": pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    else:
        table = {"image": pa.array(images, pa.binary())}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns).replace_schema_metadata(metadata), path, row_group_size=7)
    return path


def write_idx(path: Path, values: np.ndarray) -> Path:
    data = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


class Found:
    """What a scan says, by key: label name, split, text, content."""

    def __init__(self, **config):
        source = open_source(SourceConfig(**config))
        self.kind = source.kind.value
        digests = {key: sha for key, sha, _ in hash_files(source, [f for f in source.files if source.needs_hash(f)])}
        self.scan = scan = source.scan(digests)
        items = list(scan.reader.read(scan.candidates))
        assert sorted(item.slot for item in items) == list(range(len(scan.candidates)))
        number = {item.key: int(scan.candidates[item.slot]) for item in items}
        assert all(scan.reader.key(number[item.key]) == item.key for item in items)
        names = scan.class_names
        self.label = {} if scan.labels is None else {key: names[scan.labels[i]] for key, i in number.items()}
        self.split = {key: SPLITS[scan.splits[i]] if scan.splits[i] >= 0 else None for key, i in number.items()}
        self.text = {item.key: item.text for item in items}
        self.content = {item.key: item.content for item in items}
        self.rejected = dict(scan.rejected)


def shard_here(store: Path | str, source: SourceConfig, config: DatasetConfig, plan_of=make_plan) -> ImageDataset:
    """What the shard job does, in this process and without Ray."""
    opened = open_source(source)
    opened.limit(config.max_file_mb << 20)
    home = Directory(store) / f"datasets/{config.name}"
    digests = digests_of(opened, HashCache(home, "never kept"), partial(hash_files, opened))
    version = dataset_version(opened, digests, config)
    directory = home / version
    scan = opened.scan(digests)
    plan = plan_of(directory, scan, config)
    records = [make_shard(plan, index) for index in range(len(plan.shards))]
    in_shards = [tuple(item) for record in records for item in record["rejected"]]
    total = len(scan.candidates) + scan.rejected_images
    check_rejected(directory, [*scan.rejected, *in_shards], scan.rejected_images + len(in_shards), total, config)
    return commit_dataset(
        directory,
        version=version,
        image_shape=plan.image_shape,
        class_names=scan.class_names,
        shards=[record["shard"] for record in records],
        rejected=[*scan.rejected, *in_shards],
        has_text=scan.has_text,
        source={"images": total},
    )
