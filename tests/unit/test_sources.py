"""Folders of images: every layout that is accepted, and what is said of what is no source."""

from __future__ import annotations

import json
import os

import pytest

from diffusion_core.config import UserError
from tests.image_files import Found, encoded, pixels, write_images


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
