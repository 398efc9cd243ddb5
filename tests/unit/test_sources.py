"""Every layout of images that is accepted, and what is said of those that are not."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_core.config import UserError
from diffusion_core.data.config import SourceConfig
from diffusion_core.data.hashing import hash_files
from diffusion_core.data.shards import SPLITS
from diffusion_core.data.sources import open_source
from diffusion_core.data.sources.arrays import digits_from_uint8, digits_to_uint8
from diffusion_core.data.transforms import RejectedItem
from tests.image_files import encoded, pixels, write_idx, write_images, write_parquet


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


# A folder of images


def test_class_folders_give_labels(tmp_path):
    write_images(tmp_path, ["cat/1.png", "cat/deep/2.jpg", "dog/1.PNG", "10/a.png", "9/a.png"])
    found = Found(uri=str(tmp_path))
    assert found.kind == "folder" and found.scan.class_names == ["9", "10", "cat", "dog"]
    assert found.label == {
        "10/a.png": "10",
        "9/a.png": "9",
        "cat/1.png": "cat",
        "cat/deep/2.jpg": "cat",
        "dog/1.PNG": "dog",
    }
    assert set(found.split.values()) == {None}
    assert found.content["cat/1.png"] == (tmp_path / "cat/1.png").read_bytes()


def test_split_folders_give_splits(tmp_path):
    write_images(tmp_path, ["train/cat/1.png", "train/dog/2.png", "val/cat/1.png", "test/dog/3.png"])
    found = Found(uri=str(tmp_path))
    assert [found.split[key] for key in sorted(found.split)] == ["test", "train", "train", "validation"]
    assert set(found.label.values()) == {"cat", "dog"}
    assert Found(uri=str(tmp_path), splits="none").scan.class_names == ["test", "train", "val"]


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    write_images(tmp_path, ["train/1.png", "plane/1.png"])
    found = Found(uri=str(tmp_path))
    assert found.scan.class_names == ["plane", "train"] and set(found.split.values()) == {None}


def test_one_folder_is_a_place_and_not_a_class(tmp_path):
    write_images(tmp_path, ["images/1.png", "images/2.png"])
    assert Found(uri=str(tmp_path)).scan.labels is None
    assert Found(uri=str(tmp_path), labels="class_folders").label == {
        "images/1.png": "images",
        "images/2.png": "images",
    }
    assert Found(uri=str(tmp_path), labels="none").scan.labels is None


def test_images_outside_the_class_folders_are_label_gaps(tmp_path):
    write_images(tmp_path, ["a/1.png", "b/1.png", "stray.png"])
    found = Found(uri=str(tmp_path))
    assert found.rejected == {"stray.png": "no label, and other images have one"}
    assert sorted(found.label) == ["a/1.png", "b/1.png"] and found.scan.rejected_images == 1


def test_what_is_no_image_is_said_and_what_is_hidden_is_passed_over(tmp_path):
    write_images(tmp_path, ["1.png", ".hidden.png", ".git/x.png", "__MACOSX/1.png"])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "Thumbs.db").write_text("")
    found = Found(uri=str(tmp_path))
    assert list(found.content) == ["1.png"]
    assert found.rejected == {"notes.txt": "not an image file: .txt"} and found.scan.rejected_images == 0


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_metadata_gives_labels_and_captions(tmp_path, form):
    write_images(tmp_path, ["a.png", "sub/b.png", "c.png"])
    rows = [("a.png", "x", "eine Möwe, grau"), ("sub/b.png", "y", ""), ("c.png", "x", 'say "hi"')]
    if form == "csv":
        text = "file_name,label,text\n" + "".join(
            f'{n},{la},"{t.replace(chr(34), chr(34) * 2)}"\n' for n, la, t in rows
        )
        (tmp_path / "metadata.csv").write_text("\ufeff" + text, encoding="utf-8")
    else:
        lines = [json.dumps({"file_name": n, "label": la, "text": t}) for n, la, t in rows]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    found = Found(uri=str(tmp_path))
    assert found.label == {"a.png": "x", "sub/b.png": "y", "c.png": "x"}
    assert found.text == {"a.png": "eine Möwe, grau", "sub/b.png": None, "c.png": 'say "hi"'}
    assert found.scan.has_text and not found.rejected
    assert Found(uri=str(tmp_path), labels="none").scan.labels is None


def test_metadata_beside_the_images_of_each_split(tmp_path):
    write_images(tmp_path, ["train/1.png", "test/1.png"])
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").write_text(f"file_name,caption\n1.png,of {split}\n")
    found = Found(uri=str(tmp_path))
    assert found.text == {"train/1.png": "of train", "test/1.png": "of test"}
    assert found.split == {"train/1.png": "train", "test/1.png": "test"} and found.scan.labels is None


def test_metadata_and_folder_that_disagree(tmp_path):
    write_images(tmp_path, ["a.png", "b.png", "unnamed.png", "nolabel.png"])
    (tmp_path / "metadata.csv").write_text(
        "file_name,label\na.png,0\nb.png,1\na.png,1\ngone.png,1\nnolabel.png,\n../x.png,1\n"
    )
    found = Found(uri=str(tmp_path))
    assert found.label == {"a.png": "0", "b.png": "1"}
    assert found.rejected == {
        "a.png": "named twice in metadata.csv; the first row counts",
        "gone.png": "named in metadata.csv, but there is no such image file",
        "../x.png": "named in metadata.csv, but there is no such image file",
        "unnamed.png": "not named in the metadata file",
        "nolabel.png": "no label, and other images have one",
    }
    assert found.scan.rejected_images == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", b"name,label\na.png,1\n", "metadata.csv has no column file_name; its columns are name, label"),
        ("metadata.csv", b"file_name,label\na.png,1,2\n", "line 2: more fields"),
        ("metadata.csv", b"file_name,label\n,1\n", "line 2: file_name is missing"),
        ("metadata.csv", b"file_name,label\na\xff.png,1\n", "not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{broken\n', "line 2: not JSON"),
        ("metadata.jsonl", b"[1]\n", "a JSON object is needed"),
        ("metadata.jsonl", b'{"file_name": "a.png", "label": 1.5}', "label 1.5 is not accepted"),
        ("metadata.jsonl", b'{"file_name": "a.png", "label": [1]}', "is not accepted: labels are"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path, name, content, message):
    write_images(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Found(uri=str(tmp_path))


def test_links_and_names(tmp_path):
    root = write_images(tmp_path / "root", ["a/1.png", "b/1.png"])
    outside = write_images(tmp_path / "outside", ["far.png"])
    (root / "a/loop").symlink_to(root)
    (root / "b/linked").symlink_to(outside)
    (root / "b/dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "a/pipe.png")
    with open(os.fsencode(root / "a") + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(pixels(5)))
    found = Found(uri=str(root))
    assert sorted(found.content) == ["a/1.png", "b/1.png", "b/linked/far.png"]
    assert {key: reason.partition(":")[0] for key, reason in found.rejected.items()} == {
        "a/loop": "symbolic link loop",
        "b/dangling.png": "dangling symbolic link",
        "a/pipe.png": "not a regular file",
        "a/caf\\xe9.png": "its name is not valid UTF-8",
    }
    assert found.scan.rejected_images == 4


def test_a_file_that_changes_after_it_was_hashed_stops_the_job(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"])
    source = open_source(SourceConfig(uri=str(tmp_path)))
    scan = source.scan({key: sha for key, sha, _ in hash_files(source, source.files)})
    (tmp_path / "1.png").write_bytes(encoded(pixels(77)))
    with pytest.raises(UserError, match=r"1\.png has other content now; run the job again"):
        list(scan.reader.read(scan.candidates))
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png is gone"):
        list(scan.reader.read(scan.candidates))


# Parquet


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
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["ant", "bee", "cow"]}}}}
    images = [encoded(pixels(i)) for i in range(3)]
    metadata = {"huggingface": json.dumps(features)}
    path = write_parquet(tmp_path / "x.parquet", images, metadata=metadata, label=pa.array([2, 0, 2]))
    assert Found(uri=str(path)).label == {"x.parquet#0": "cow", "x.parquet#1": "ant", "x.parquet#2": "cow"}
    assert Found(uri=str(path)).scan.class_names == ["ant", "bee", "cow"]
    with pytest.raises(UserError, match="label 2 is outside the 2 class names"):
        Found(uri=str(path), class_names=("x", "y"))


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


# IDX, .npz, digits


@pytest.mark.parametrize("end", [".gz", ""])
def test_idx_files_with_the_names_of_mnist(tmp_path, end):
    train, test = np.stack([pixels(i, channels=1) for i in range(30)]), np.stack([pixels(99, channels=1)] * 4)
    write_idx(tmp_path / f"train-images-idx3-ubyte{end}", train)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{end}", np.arange(30, dtype=np.uint8) % 10)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{end}", test)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{end}", np.arange(4, dtype=np.uint8))
    names = tuple("abcdefghij")
    found = Found(uri=str(tmp_path), class_names=names)
    assert found.kind == "idx" and len(found.content) == 34
    for i in range(30):
        key = f"train-images-idx3-ubyte{end}#{i}"
        np.testing.assert_array_equal(found.content[key], train[i])
        assert (found.label[key], found.split[key]) == (names[i % 10], "train")
    assert found.split[f"t10k-images-idx3-ubyte{end}#0"] == "test"


def test_truncated_idx_rejects_what_is_missing(tmp_path):
    path = write_idx(tmp_path / "train-images-idx3-ubyte", np.stack([pixels(i, channels=1) for i in range(30)]))
    path.write_bytes(path.read_bytes()[:-200])
    found = Found(uri=str(tmp_path))
    bad = sorted(key for key, content in found.content.items() if isinstance(content, RejectedItem))
    assert bad == ["train-images-idx3-ubyte#28", "train-images-idx3-ubyte#29"]
    zipped = write_idx(
        tmp_path / "z" / "train-images-idx3-ubyte.gz", np.stack([pixels(i, channels=1) for i in range(30)])
    )
    zipped.write_bytes(zipped.read_bytes()[:-300])
    found = Found(uri=str(tmp_path / "z"))
    assert 0 < sum(isinstance(content, RejectedItem) for content in found.content.values()) <= 30


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train-images-idx3-ubyte": np.zeros((2, 3), np.uint8)}, "has 2 dimensions"),
        ({"train-images-idx3-ubyte": b"\0\0\x0d\3" + bytes(60)}, "not an IDX file of unsigned bytes"),
        ({"train-images-idx3-ubyte": b"\0\0"}, "header cannot be read"),
        ({"train-images-idx3-ubyte.gz": b"not gzip"}, "header cannot be read"),
        ({"train-images-idx3-ubyte": b"\0\0\x08\3" + b"\x7f\xff\xff\xff" * 3 + b"x"}, "more than the file can hold"),
        ({"train-images-idx3-ubyte": np.zeros((0, 3, 3), np.uint8)}, "no image in it"),
        (
            {
                "train-images-idx3-ubyte": np.zeros((2, 3, 3), np.uint8),
                "train-labels-idx1-ubyte": np.zeros(3, np.uint8),
            },
            r"has shape \(3,\), and train-images-idx3-ubyte has 2 images",
        ),
        ({"train-labels-idx1-ubyte": np.zeros(3, np.uint8)}, "no readable IDX file of images"),
    ],
)
def test_idx_that_is_not_understood(tmp_path, files, message):
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            write_idx(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        Found(uri=str(tmp_path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_splits(tmp_path, save):
    train, test = np.stack([pixels(i) for i in range(9)]), np.stack([pixels(50 + i) for i in range(4)])
    save(tmp_path / "x.npz", x_train=train, y_train=np.arange(9) % 2, x_test=test, y_test=np.zeros((4, 1), np.int64))
    found = Found(uri=str(tmp_path / "x.npz"))
    assert found.kind == "npz" and found.scan.class_names == ["0", "1"] and len(found.content) == 13
    np.testing.assert_array_equal(found.content["x.npz#x_train/5"], train[5])
    np.testing.assert_array_equal(found.content["x.npz#x_test/2"], test[2])
    assert (found.split["x.npz#x_train/5"], found.split["x.npz#x_test/2"]) == ("train", "test")
    assert found.label["x.npz#x_train/5"] == "1"


def test_npz_with_plain_names_and_text_labels(tmp_path):
    np.savez(
        tmp_path / "x.npz", images=np.stack([pixels(i, channels=1) for i in range(3)]), labels=np.array(["b", "a", "b"])
    )
    assert list(Found(uri=str(tmp_path)).label.values()) == ["b", "a", "b"]
    np.savez(
        tmp_path / "x.npz", train_images=np.zeros((3, 8, 8, 3), np.uint8), val_images=np.zeros((2, 8, 8, 3), np.uint8)
    )
    found = Found(uri=str(tmp_path))
    assert sorted(found.split.values(), key=str) == ["train"] * 3 + ["validation"] * 2 and found.scan.labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, "has the arrays pictures; images"),
        ({"images": np.zeros((2, 8, 8), np.float32)}, "is float32; images are uint8"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"has shape \(2, 3, 8, 8\)"),
        ({"images": np.zeros((2, 8), np.uint8)}, r"has shape \(2, 8\)"),
        ({"images": np.asfortranarray(np.zeros((2, 8, 8), np.uint8))}, "Fortran order"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(3)}, "2 images and 3 labels"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([{}, 1], object)}, "allow_pickle"),
        ({"images": np.array([{}, 1], object)}, "is object; images are uint8"),
    ],
)
def test_npz_that_is_not_understood(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        Found(uri=str(tmp_path / "x.npz"))
    (tmp_path / "x.npz").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match=r"x\.npz is not a readable \.npz archive"):
        Found(uri=str(tmp_path / "x.npz"))


def test_the_bundled_digits():
    from sklearn.datasets import load_digits

    found = Found(kind="digits")
    digits = load_digits()
    assert len(found.content) == 1797 and found.scan.class_names == list("0123456789")
    for i in (0, 5, 1796):
        np.testing.assert_array_equal(digits_from_uint8(found.content[f"scikit-learn/digits#{i}"]), digits.images[i])
        assert found.label[f"scikit-learn/digits#{i}"] == str(digits.target[i])


def test_the_scale_of_the_digits_is_exactly_invertible():
    levels = np.arange(17)
    assert digits_to_uint8(levels).tolist() == [int(level * 255 / 16 + 0.5) for level in levels]
    np.testing.assert_array_equal(digits_from_uint8(digits_to_uint8(levels)), levels)
    assert digits_from_uint8(np.arange(256, dtype=np.uint8)).max() == 16


# What is no source


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        (None, {}, "does not exist: give a folder or a file of images"),
        ([], {}, "is empty: there is no file in it"),
        (["a.docx", "b.zip"], {}, "holds no images: .*and there is .docx, .zip"),
        (["a.txt"], {"kind": "folder"}, r"holds no image file \(1 other files\)"),
        (["a.txt"], {"kind": "parquet"}, "holds no Parquet rows"),
        (["a.txt"], {"kind": "npz"}, "holds no readable .npz archive"),
        (["a.txt"], {"kind": "idx"}, "holds no readable IDX file"),
        (["a.png"], {"labels": "class_folders"}, "class_folders gives no label"),
        (["a.png"], {"labels": "metadata"}, "metadata gives no label"),
        (["a.png"], {"labels": "column"}, "a folder has class_folders or metadata"),
    ],
)
def test_what_is_no_source(tmp_path, files, config, message):
    root = tmp_path / "source"
    if files is not None:
        root.mkdir()
        for name in files:
            (root / name).write_bytes(encoded(pixels(0)))
    with pytest.raises(UserError, match=message):
        Found(uri=str(root), **config)
