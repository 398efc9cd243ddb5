"""The three forms in which a shard of images is stored. The same images always give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion_core.generation.config import ImageFormat
from diffusion_core.generation.plan import Shard

PNG_COMPRESSION = 6
ROWS_PER_GROUP = 256


@dataclass(frozen=True)
class ShardContent:
    """What a shard holds: image ids (N,) int64, images (N, H, W, C) uint8, classes (N,) int64 or None, the seed.

    `sha256` are the digests of the pixels as stored beside them; empty until the shard has been stored.
    """

    image_ids: np.ndarray
    images: np.ndarray
    labels: np.ndarray | None
    seed: int
    class_names: tuple[str, ...] = ()
    sha256: tuple[str, ...] = field(default=())

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dictionary per image, without its pixels."""
        for n, (image_id, image) in enumerate(zip(self.image_ids.tolist(), self.images, strict=True)):
            row: dict[str, Any] = {"image_id": image_id}
            if self.labels is not None:
                row |= {"label": int(self.labels[n]), "text": self.class_names[int(self.labels[n])]}
            yield row | {"seed": self.seed, "sha256": self.sha256[n] if self.sha256 else pixel_digest(image)}


def pixel_digest(image: np.ndarray) -> str:
    """SHA-256 of the raw uint8 pixels in HWC order."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def image_name(image_id: int) -> str:
    return f"{image_id:09d}"


def encode_png(image: np.ndarray) -> bytes:
    """An (H, W, 1) or (H, W, 3) uint8 image as PNG."""
    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The (H, W, C) uint8 pixels of a PNG."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def data_keys(form: ImageFormat, shard: Shard) -> list[str]:
    """Keys of the files that hold a shard, its record aside."""
    if form is ImageFormat.PARQUET:
        return [f"{shard.key}.parquet"]
    if form is ImageFormat.WEBDATASET:
        return [f"{shard.key}.tar"]
    names = [f"{shard.key}/{image_name(image_id)}.png" for image_id in range(shard.first_image_id, shard.stop)]
    return [*names, f"{shard.key}/metadata.jsonl"]


def data_digest(files: dict[str, bytes]) -> str:
    """SHA-256 of a shard's data: of the file if there is one, else of the lines `<sha256>  <key>` sorted by key."""
    digests = {key: hashlib.sha256(data).hexdigest() for key, data in files.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[key]}  {key}\n" for key in sorted(digests)).encode()).hexdigest()


def encode(form: ImageFormat, shard: Shard, content: ShardContent) -> dict[str, bytes]:
    """The files of a shard by key, in the order of `data_keys`."""
    keys = data_keys(form, shard)
    if form is ImageFormat.PARQUET:
        return {keys[0]: _to_parquet(content)}
    if form is ImageFormat.WEBDATASET:
        return {keys[0]: _to_tar(content)}
    rows = [{"file_name": f"{image_name(row['image_id'])}.png", **row} for row in content.rows()]
    metadata = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return dict(zip(keys, [*map(encode_png, content.images), metadata], strict=True))


def decode(form: ImageFormat, files: dict[str, bytes]) -> ShardContent:
    """What the files of a shard hold. Raises `ValueError` or `OSError` if they are damaged."""
    if form is ImageFormat.PARQUET:
        rows, images = _from_parquet(next(iter(files.values())))
    elif form is ImageFormat.WEBDATASET:
        rows, images = _from_tar(next(iter(files.values())))
    else:
        rows = [json.loads(line) for line in files[next(key for key in files if key.endswith(".jsonl"))].splitlines()]
        images = [decode_png(data) for key, data in files.items() if key.endswith(".png")]
    if not rows or len(rows) != len(images):
        raise ValueError(f"{len(rows)} rows for {len(images)} images")
    labels = np.array([row["label"] for row in rows], dtype=np.int64) if "label" in rows[0] else None
    return ShardContent(
        image_ids=np.array([row["image_id"] for row in rows], dtype=np.int64),
        images=np.stack(images),
        labels=labels,
        seed=rows[0]["seed"],
        sha256=tuple(row["sha256"] for row in rows),
    )


def write_parquet(table: pa.Table) -> bytes:
    """A table as Parquet with every option fixed, so that the bytes depend on the table alone."""
    sink = pa.BufferOutputStream()
    plain = [item.name for item in table.schema if pa.types.is_integer(item.type)]
    pq.write_table(
        table,
        sink,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=plain,
        row_group_size=ROWS_PER_GROUP if "image" in table.column_names else 1 << 20,
    )
    return sink.getvalue().to_pybytes()


def _to_parquet(content: ShardContent) -> bytes:
    rows = list(content.rows())
    image = pa.StructArray.from_arrays(
        [
            pa.array([encode_png(image) for image in content.images], pa.binary()),
            pa.array([f"{image_name(row['image_id'])}.png" for row in rows], pa.string()),
        ],
        names=["bytes", "path"],
    )
    columns: dict[str, pa.Array] = {"image_id": _column(rows, "image_id", pa.int64()), "image": image}
    if content.labels is not None:
        columns |= {"label": _column(rows, "label", pa.int64()), "text": _column(rows, "text", pa.string())}
    columns |= {"seed": _column(rows, "seed", pa.int64()), "sha256": _column(rows, "sha256", pa.string())}
    features = json.dumps(huggingface_features(content), sort_keys=True, separators=(",", ":"))
    return write_parquet(pa.table(columns).replace_schema_metadata({"huggingface": features}))


def huggingface_features(content: ShardContent) -> dict[str, Any]:
    """What the `datasets` library reads of a Parquet file's schema: the column `image` holds images, and so on."""

    def value(dtype: str) -> dict[str, str]:
        return {"dtype": dtype, "_type": "Value"}

    features: dict[str, Any] = {"image_id": value("int64"), "image": {"_type": "Image"}}
    if content.labels is not None:
        features |= {"label": {"names": list(content.class_names), "_type": "ClassLabel"}, "text": value("string")}
    return {"info": {"features": features | {"seed": value("int64"), "sha256": value("string")}}}


def _column(rows: Sequence[dict[str, Any]], name: str, kind: pa.DataType) -> pa.Array:
    return pa.array([row[name] for row in rows], kind)


def _from_parquet(data: bytes) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    table = pq.read_table(pa.BufferReader(data))
    images = [decode_png(image["bytes"]) for image in table["image"].to_pylist()]
    return table.drop_columns(["image"]).to_pylist(), images


def _to_tar(content: ShardContent) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, image in zip(content.rows(), content.images, strict=True):
            name = image_name(row["image_id"])
            if "label" in row:
                _add(tar, f"{name}.cls", str(row["label"]).encode())
            _add(tar, f"{name}.json", json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
            _add(tar, f"{name}.png", encode_png(image))
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644: nothing of the machine that wrote it
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _from_tar(data: bytes) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    if not data.endswith(bytes(1024)):  # two empty blocks end an archive; tarfile itself does not ask for them
        raise ValueError("not a complete tar")
    rows, images = [], []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".json"):
                    rows.append(json.loads(file.read()))
                elif file is not None and member.name.endswith(".png"):
                    images.append(decode_png(file.read()))
    except tarfile.TarError as error:
        raise ValueError(f"not a complete tar: {error}") from error
    return rows, images
