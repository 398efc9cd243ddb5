"""The dataset contract on disk, and reading it back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffusion_core.config import UserError
from diffusion_core.data.shards import Batch, commit_shard, decode_shard, encode_shard, open_dataset, write_dataset
from diffusion_core.store import Directory


def batch(rows: int, shape=(4, 5, 3), classes: int = 3, seed: int = 0, text: bool = False) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        rng.integers(0, 256, (rows, *shape), dtype=np.uint8),
        rng.integers(0, classes, rows) if classes else None,
        [f"caption {row}" if row % 3 else None for row in range(rows)] if text else None,
        [f"{seed}/{row}.png" for row in range(rows)],
    )


@pytest.mark.parametrize(("classes", "text"), [(3, False), (0, True), (3, True), (0, False)])
def test_a_dataset_reads_back_what_was_written(tmp_path, classes, text):
    names = [f"class {i}" for i in range(classes)]
    train, test = batch(25, classes=classes, text=text), batch(7, classes=classes, seed=1, text=text)
    made = write_dataset(str(tmp_path), "small", {"train": train, "test": test}, names, rows_per_shard=10)
    dataset = open_dataset(made.uri)
    assert dataset.uri == f"{tmp_path}/datasets/small/{dataset.version}"
    assert (dataset.name, dataset.image_shape, dataset.class_names) == ("small", (4, 5, 3), names)
    assert dataset.splits == {"train": 25, "test": 7}
    assert [shard["rows"] for shard in dataset.manifest["shards"]] == [10, 10, 5, 7]
    for split, wanted in (("train", train), ("test", test)):
        read = dataset.read(split)
        np.testing.assert_array_equal(read.images, wanted.images)
        assert read.text == wanted.text and read.keys == wanted.keys
        assert (read.labels is None) == (wanted.labels is None)
        if wanted.labels is not None:
            np.testing.assert_array_equal(read.labels, wanted.labels)
            assert read.labels.dtype == np.int64
    assert dataset.rejected() == []


@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 0), (0, 1), (8, 5), (10, 10), (3, None), (20, 100), (25, 3), (9, 12)]
)
def test_a_range_of_rows(tmp_path, offset, limit):
    rows = batch(25)
    dataset = write_dataset(str(tmp_path), "small", {"train": rows}, ["a", "b", "c"], rows_per_shard=10)
    stop = None if limit is None else offset + limit
    part = dataset.read("train", limit, offset)
    np.testing.assert_array_equal(part.images, rows.images[offset:stop])
    np.testing.assert_array_equal(part.labels, rows.labels[offset:stop])
    assert part.keys == rows.keys[offset:stop]


def test_the_parquet_layout_is_the_contract(tmp_path):
    dataset = write_dataset(str(tmp_path), "small", {"train": batch(6, text=True)}, ["a", "b", "c"])
    file = pq.ParquetFile(f"{dataset.uri}/shards/part-00000.parquet")
    schema = file.schema_arrow
    assert str(schema.field("image").type) == "fixed_size_binary[60]"
    assert [str(schema.field(name).type) for name in ("label", "text", "key")] == ["int32", "string", "string"]
    assert json.loads(schema.metadata[b"image_shape"]) == [4, 5, 3] and schema.metadata[b"image_dtype"] == b"uint8"
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    record = dataset.manifest["shards"][0]
    data = (Path(dataset.uri) / record["file"]).read_bytes()
    assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert dataset.manifest["schema_version"] == 1 and dataset.manifest["image_dtype"] == "uint8"


def test_pixels_are_viewed_not_copied():
    images = decode_shard(encode_shard(batch(100))).images
    assert not images.flags.owndata and images.flags.c_contiguous


def test_the_same_rows_give_the_same_bytes_and_version(tmp_path):
    assert encode_shard(batch(9)) == encode_shard(batch(9))
    one = write_dataset(str(tmp_path / "one"), "small", {"train": batch(9)}, ["a", "b", "c"])
    two = write_dataset(str(tmp_path / "two"), "small", {"train": batch(9)}, ["a", "b", "c"])
    other = write_dataset(str(tmp_path / "two"), "small", {"train": batch(9, seed=1)}, ["a", "b", "c"])
    assert one.version == two.version != other.version


def test_who_loses_the_race_records_what_is_stored(tmp_path):
    place = Directory(tmp_path)
    first = commit_shard(place, 0, "train", batch(9))
    assert commit_shard(place, 0, "train", batch(5, seed=2)) == first


def test_verify_names_the_damaged_shard(tmp_path):
    dataset = write_dataset(str(tmp_path), "small", {"train": batch(30)}, ["a", "b", "c"], rows_per_shard=10)
    assert [problem for _, problem in dataset.verify()] == [None] * 3
    path = tmp_path / "datasets/small" / dataset.version / "shards/part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    (path.parent / "part-00002.parquet").unlink()
    assert [bool(problem) for _, problem in dataset.verify()] == [False, True, True]
    with pytest.raises(UserError, match=r"part-00001\.parquet cannot be read"):
        dataset.read("train")
    with pytest.raises(UserError, match=r"part-00002\.parquet is missing"):
        dataset.read("train", 5, 20)


def test_what_is_not_a_dataset_is_refused(tmp_path):
    dataset = write_dataset(str(tmp_path), "small", {"train": batch(3)}, ["a", "b", "c"])
    with pytest.raises(UserError, match=f"did you mean {dataset.uri}"):
        open_dataset(str(tmp_path / "datasets/small"))
    with pytest.raises(UserError, match="there is no manifest"):
        open_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        dataset.read("test")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="describes something else"):
        open_dataset(str(tmp_path / "odd"))
    (tmp_path / "odd/manifest.json").write_text(json.dumps(dataset.manifest | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        open_dataset(str(tmp_path / "odd"))


@pytest.mark.parametrize(
    ("splits", "names", "message"),
    [
        ({}, ["a"], "no images"),
        ({"train": batch(0)}, ["a", "b", "c"], "no images"),
        ({"training": batch(3)}, ["a", "b", "c"], "'training' is unknown"),
        ({"train": batch(3), "test": batch(3, shape=(4, 4, 3))}, ["a", "b", "c"], "one shape"),
        ({"train": batch(3)}, [], "labels without class names"),
        ({"train": batch(3, classes=0)}, ["a"], "class names without labels"),
        ({"train": batch(30)}, ["a", "b"], "between 0 and 1"),
    ],
)
def test_arrays_that_make_no_dataset(tmp_path, splits, names, message):
    with pytest.raises(UserError, match=message):
        write_dataset(str(tmp_path), "small", splits, names)
    assert not (tmp_path / "datasets").exists()
