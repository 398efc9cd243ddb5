"""IDX files, .npz archives and the bundled digits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from diffusion_core.config import UserError
from diffusion_core.data.sources.digits import digits_from_uint8, digits_to_uint8
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.store import Directory
from tests.image_files import Found, pixels, write_idx


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


@pytest.mark.parametrize("kind", ["idx", "npz"])
def test_compressed_files_are_read_in_few_pieces(tmp_path, monkeypatch, kind):
    """On S3 every piece is a request."""
    images = np.random.default_rng(0).integers(0, 256, (2000, 28, 28), dtype=np.uint8)
    labels = np.zeros(2000, np.uint8)
    if kind == "idx":
        write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    else:
        np.savez_compressed(tmp_path / "all.npz", images=images, labels=labels)
    pieces = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            pieces.append(size)
            return super().read(size)

    monkeypatch.setattr(Directory, "open", lambda place, key: pa.PythonFile(Counted(Path(place.uri) / key), "r"))
    assert len(Found(uri=str(tmp_path)).content) == 2000
    assert 0 < len(pieces) < 40
