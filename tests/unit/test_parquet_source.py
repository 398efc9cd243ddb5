"""Parquet files: the Hugging Face image layout, splits, labels, and what is said of those that are not understood."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_core.config import UserError
from diffusion_core.data.config import SourceConfig
from diffusion_core.data.hashing import hash_files
from diffusion_core.data.sources import open_source
from diffusion_core.data.transforms import RejectedItem
from tests.image_files import Found, encoded, pixels, write_images, write_parquet

IMAGE = encoded(pixels(7))


def class_label(*names: str) -> dict[str, str]:
    """The schema's metadata as Hugging Face `datasets` writes it."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(names), "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    return {"huggingface": json.dumps({"info": {"features": features}})}


@pytest.mark.parametrize("layout", ["struct", "binary"])
def test_parquet_in_the_hugging_face_layout(tmp_path, layout):
    images = [encoded(pixels(i)) for i in range(20)]
    write_parquet(
        tmp_path / "data.parquet",
        images,
        layout,
        label=pa.array([i % 3 for i in range(20)]),
        text=[f"no {i}" for i in range(20)],
        split=["train"] * 15 + ["test"] * 5,
    )
    found = Found(uri=str(tmp_path / "data.parquet"))
    assert found.kind == "parquet" and found.scan.class_names == ["0", "1", "2"] and found.scan.has_text
    for i in range(20):
        key = f"data.parquet#{i}"
        assert (found.content[key], found.label[key], found.text[key]) == (images[i], str(i % 3), f"no {i}")
        assert found.split[key] == ("train" if i < 15 else "test")
    assert set(Found(uri=str(tmp_path), splits="none", labels="none").split.values()) == {None}


def test_file_names_give_splits(tmp_path):
    images = [encoded(pixels(i)) for i in range(4)]
    for name in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/more_val.parquet"):
        write_parquet(tmp_path / name, images)
    found = Found(uri=str(tmp_path))
    assert {key.partition("#")[0].partition("/")[2]: split for key, split in found.split.items()} == {
        "train-00000-of-00001.parquet": "train",
        "test-00000-of-00001.parquet": "test",
        "more_val.parquet": "validation",
    }


def test_any_rows_in_any_order_come_back(tmp_path):
    images = [encoded(pixels(i)) for i in range(60)]
    write_parquet(tmp_path / "a.parquet", images[:25])
    write_parquet(tmp_path / "b.parquet", images[25:])
    reader = Found(uri=str(tmp_path)).scan.reader
    wanted = np.random.default_rng(0).permutation(60)[:31]
    assert {item.slot: item.content for item in reader.read(wanted)} == {i: images[k] for i, k in enumerate(wanted)}
    assert [n for chunk in reader.chunks() for n in chunk] == list(range(60))


def test_declared_class_names_keep_their_numbers(tmp_path):
    metadata = class_label("ant", "bee", "cow")
    path = write_parquet(tmp_path / "x.parquet", [IMAGE] * 3, metadata=metadata, label=pa.array([2, 0, 2]))
    assert Found(uri=str(path)).label == {"x.parquet#0": "cow", "x.parquet#1": "ant", "x.parquet#2": "cow"}
    assert Found(uri=str(path)).scan.class_names == ["ant", "bee", "cow"]
    with pytest.raises(UserError, match="label 2 is outside the 2 class names"):
        Found(uri=str(path), class_names=("x", "y"))


def test_numbers_are_places_among_the_declared_names_even_if_the_names_are_numbers(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet", [IMAGE] * 3, metadata=class_label("2", "1", "0"), label=pa.array([2, 0, 1])
    )
    assert list(Found(uri=str(path)).label.values()) == ["0", "2", "1"]


def test_files_that_declare_different_names(tmp_path):
    for name, names in (("a", ("cat", "dog")), ("b", ("dog", "cat"))):
        write_parquet(tmp_path / f"{name}.parquet", [IMAGE], metadata=class_label(*names), label=pa.array([0]))
    with pytest.raises(UserError, match=r"b\.parquet declares other class names than the files before it"):
        Found(uri=str(tmp_path))


def test_minus_one_is_no_label_of_a_class_label(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet", [IMAGE] * 3, metadata=class_label("ant", "bee"), label=pa.array([1, -1, 0])
    )
    found = Found(uri=str(path))
    assert found.label == {"x.parquet#0": "bee", "x.parquet#2": "ant"}
    assert found.rejected == {"x.parquet#1": "no label, and other images have one"}
    path = write_parquet(tmp_path / "x.parquet", [IMAGE] * 3, metadata=class_label("ant"), label=pa.array([-1] * 3))
    found = Found(uri=str(path))
    assert found.scan.labels is None and len(found.content) == 3 and not found.rejected


def test_rows_that_name_image_files_beside_the_parquet_file(tmp_path):
    write_images(tmp_path / "set", ["data/one.png", "data/deep/two.jpg", "three.png", "never_named.png"])
    write_images(tmp_path, ["outside.png"])
    cells = [
        {"bytes": None, "path": "one.png"},
        {"bytes": IMAGE, "path": None},
        {"bytes": None, "path": "deep/two.jpg"},
        {"bytes": None, "path": "../three.png"},
        {"bytes": IMAGE, "path": "one.png"},
        {"bytes": None, "path": "gone.png"},
        {"bytes": None, "path": "../../outside.png"},
        {"bytes": None, "path": str(tmp_path / "outside.png")},
        {"bytes": None, "path": None},
    ]
    path = write_parquet(tmp_path / "set/data/x.parquet", cells * 3, text=[str(i) for i in range(27)])
    found = Found(uri=str(tmp_path / "set"), kind="parquet")
    for i in range(0, 27, 9):
        content = {k: found.content[f"data/x.parquet#{i + k}"] for k in range(9)}
        assert content[0] == (tmp_path / "set/data/one.png").read_bytes() and content[1] == content[4] == IMAGE
        assert content[2] == (tmp_path / "set/data/deep/two.jpg").read_bytes()
        assert content[3] == (tmp_path / "set/three.png").read_bytes()
        assert str(content[5]) == "no image bytes, only the path gone.png, where no file is"
        assert all("where no file is" in str(content[k]) for k in (6, 7))
        assert str(content[8]) == "no image: null"
    assert found.text["data/x.parquet#12"] == "12"
    alone = Found(uri=str(path))  # the folder of the file is then the source, and nothing above it
    assert alone.content["x.parquet#0"] == found.content["data/x.parquet#0"]
    assert "where no file is" in str(alone.content["x.parquet#3"])


def test_files_that_rows_name_are_part_of_what_is_hashed(tmp_path):
    write_images(tmp_path, ["1.png", "2.png", "large.png", "never_named.png"])
    cells = [{"bytes": None, "path": name} for name in ("1.png", "2.png", "large.png")]
    source = open_source(SourceConfig(uri=str(write_parquet(tmp_path / "x.parquet", cells))))
    assert [file.key for file in source.files] == ["1.png", "2.png", "large.png", "x.parquet"]
    (tmp_path / "large.png").write_bytes(bytes(5000))
    source = open_source(SourceConfig(uri=str(tmp_path), kind="parquet"))
    source.limit(4000)
    assert [file.key for file in source.files if source.needs_hash(file)] == ["1.png", "2.png", "x.parquet"]
    scan = source.scan({key: sha256 for key, sha256, _ in hash_files(source, source.files)})
    contents = {item.slot: item.content for item in scan.reader.read(scan.candidates)}
    assert str(contents[2]) == "too large a file: 5,000 bytes" and scan.rejected_images == 0
    (tmp_path / "2.png").write_bytes(IMAGE)
    with pytest.raises(UserError, match=r"The source changed while it was sharded: 2\.png has other content now"):
        list(scan.reader.read(scan.candidates))


def test_label_gaps_and_missing_images_in_parquet(tmp_path):
    images = [encoded(pixels(0)), None, encoded(pixels(2)), encoded(pixels(3)), encoded(pixels(4))]
    path = write_parquet(
        tmp_path / "x.parquet", images, label=pa.array([7, 7, None, -1, 40]), split=["train"] * 4 + ["unlabelled"]
    )
    found = Found(uri=str(path))
    assert found.label == {"x.parquet#0": "7", "x.parquet#1": "7"}
    assert isinstance(found.content["x.parquet#1"], RejectedItem) and "only the path 1.png" in str(
        found.content["x.parquet#1"]
    )
    assert found.rejected == {
        "x.parquet#2": "no label, and other images have one",
        "x.parquet#3": "no label, and other images have one",
        "x.parquet#4": "its split is none of train, validation, test",
    }


def test_broken_parquet_files_are_rejected_and_weigh_as_much_as_the_others(tmp_path):
    images = [encoded(pixels(i)) for i in range(30)]
    good = write_parquet(tmp_path / "a.parquet", images)
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(good.read_bytes()[:-20])
    found = Found(uri=str(tmp_path))
    assert len(found.content) == 30 and set(found.rejected) == {"b.parquet", "c.parquet"}
    assert found.scan.rejected_images == 60
    with pytest.raises(UserError, match=r"holds no Parquet rows: b\.parquet is not a readable"):
        Found(uri=str(tmp_path / "b.parquet"))


def test_a_damaged_row_group_rejects_its_rows_only(tmp_path):
    images = [encoded(pixels(i)) for i in range(21)]
    path = tmp_path / "x.parquet"
    table = pa.table({"image": pa.array(images, pa.binary())})
    pq.write_table(table, path, row_group_size=7, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(images[10]) + 20] ^= 1
    path.write_bytes(data)
    content = Found(uri=str(path)).content
    for i in range(21):
        if i // 7 == 1:
            assert "row group 1 cannot be read" in str(content[f"x.parquet#{i}"])
        else:
            assert content[f"x.parquet#{i}"] == images[i]


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"image": [1, 2]}, {}, "no image column that can be told from its columns image"),
        ({"a": [b"x", b"y"], "b": [b"x", b"y"]}, {}, "name it in source.image_column"),
        ({"image": [b"x", b"y"]}, {"image_column": "photo"}, "photo is not in x.parquet; its columns are image"),
        ({"image": [b"x", b"y"], "n": [1, 2]}, {"image_column": "n"}, "is int64, not image bytes"),
        ({"image": [b"x", b"y"]}, {"label_column": "kind"}, "source.label_column: kind is not in"),
        ({"image": [b"x", b"y"]}, {"labels": "column"}, "has no column label or labels or class"),
        ({"image": [b"x", b"y"]}, {"labels": "class_folders"}, "is for folders of images"),
        ({"image": [b"x", b"y"], "label": [0.5, 1]}, {}, "label 0.5 is not accepted"),
        ({"image": pa.array([], pa.binary())}, {}, "holds no Parquet rows"),
    ],
)
def test_parquet_that_is_not_understood(tmp_path, columns, config, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        Found(uri=str(tmp_path / "x.parquet"), **config)
