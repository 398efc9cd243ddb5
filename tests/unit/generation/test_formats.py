"""Shards in three forms: the same images always give the same bytes, and come back as they were."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_core.generation.config import ImageFormat
from diffusion_core.generation.formats import ShardContent, data_digest, data_keys, decode, encode, pixel_digest
from diffusion_core.generation.plan import Shard

SHARD = Shard(number=3, first_image_id=30, count=5)
CHANNELS = [1, 3]


def some_images(channels=3, labels=True):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, channels), dtype=np.uint8)
    classes = np.array([0, 1, 0, 1, 1]) if labels else None
    return ShardContent(np.arange(30, 35), images, classes, seed=7, class_names=("Katze", "größer"))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("form", list(ImageFormat))
def test_images_come_back_and_bytes_are_the_same_every_time(form, channels, labels):
    content = some_images(channels, labels)
    files = encode(form, SHARD, content)
    assert list(files) == data_keys(form, SHARD)
    assert files == encode(form, SHARD, some_images(channels, labels))
    back = decode(form, files)
    np.testing.assert_array_equal(back.images, content.images)
    np.testing.assert_array_equal(back.image_ids, content.image_ids)
    assert (back.labels is None) == (not labels)
    if labels:
        np.testing.assert_array_equal(back.labels, content.labels)
    assert back.seed == 7
    assert list(back.sha256) == [pixel_digest(image) for image in content.images]


def test_parquet_is_in_the_hugging_face_image_layout():
    (data,) = encode(ImageFormat.PARQUET, SHARD, some_images()).values()
    table = pq.read_table(pa.BufferReader(data))
    assert table.column_names == ["image_id", "image", "label", "text", "seed", "sha256"]
    assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["Katze", "größer"], "_type": "ClassLabel"}
    row = table.to_pylist()[1]
    assert (row["image_id"], row["image"]["path"], row["label"], row["text"]) == (31, "000000031.png", 1, "größer")
    pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    np.testing.assert_array_equal(pixels, some_images().images[1])


def test_tar_headers_hold_nothing_of_the_machine():
    (data,) = encode(ImageFormat.WEBDATASET, SHARD, some_images()).values()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["000000030.cls", "000000030.json", "000000030.png"]
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in members} == {
        (0, 0, 0, "", 0o644)
    }


def test_png_folder_has_the_metadata_of_an_image_folder():
    files = encode(ImageFormat.PNG, SHARD, some_images(channels=1))
    lines = [json.loads(line) for line in files["shards/part-00003/metadata.jsonl"].splitlines()]
    assert [f"shards/part-00003/{line['file_name']}" for line in lines] == list(files)[:-1]
    assert Image.open(io.BytesIO(files["shards/part-00003/000000030.png"])).mode == "L"


def test_the_digest_of_several_files_depends_on_each_byte_and_name():
    files = {"a": b"1", "b": b"2"}
    assert len({data_digest(item) for item in (files, {"a": b"1", "c": b"2"}, {"a": b"2", "b": b"1"})}) == 3
    assert data_digest(files) == data_digest({"b": b"2", "a": b"1"})


@pytest.mark.parametrize("form", [ImageFormat.PARQUET, ImageFormat.WEBDATASET])
def test_a_truncated_shard_cannot_be_read(form):
    files = {key: data[: len(data) // 2] for key, data in encode(form, SHARD, some_images()).items()}
    with pytest.raises((ValueError, OSError)):
        decode(form, files)
