"""What is read from a source must be what its hash, and so the dataset's version, was made from."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffusion_core.data.config import SourceConfig
from diffusion_core.data.hashing import HashCache, hash_files
from diffusion_core.data.sources import Source, open_source
from diffusion_core.data.sources.hashed import SourceChanged
from diffusion_core.store import Directory
from tests.image_files import encoded, pixels, write_idx, write_images, write_parquet

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def folder(root: Path, seed: int) -> None:
    write_images(root, ["a/1.png", "b/2.png"])
    (root / "a/1.png").write_bytes(encoded(pixels(seed)))


def metadata(root: Path, seed: int) -> None:
    write_images(root, ["1.png", "2.png"])
    (root / "metadata.csv").write_text(f"file_name,text\n1.png,{seed}\n2.png,two\n")


def parquet(root: Path, seed: int) -> None:
    write_parquet(root / "x.parquet", [encoded(pixels(seed + i)) for i in range(30)])


def idx(root: Path, seed: int) -> None:
    write_idx(root / IMAGES, np.stack([pixels(seed + i, channels=1) for i in range(20)]))


def idx_labels(root: Path, seed: int) -> None:
    idx(root, 0)
    write_idx(root / LABELS, np.arange(seed, seed + 20, dtype=np.uint8))


def npz(root: Path, seed: int) -> None:
    root.mkdir(exist_ok=True)
    np.savez(root / "x.npz", images=np.stack([pixels(seed + i) for i in range(20)]))


def hashed(root: Path) -> tuple[Source, dict[str, str]]:
    source = open_source(SourceConfig(uri=str(root)))
    return source, {
        key: sha for key, sha, _ in hash_files(source, [file for file in source.files if source.needs_hash(file)])
    }


WRITERS = {
    "a/1.png": folder,
    "metadata.csv": metadata,
    "x.parquet": parquet,
    IMAGES: idx,
    LABELS: idx_labels,
    "x.npz": npz,
}
READ_IN_PASS_2 = [key for key in WRITERS if key not in ("metadata.csv", LABELS)]


@pytest.mark.parametrize(("key", "write"), WRITERS.items())
def test_a_file_that_changes_after_it_was_hashed(tmp_path: Path, key: str, write: Callable[[Path, int], None]):
    write(tmp_path, 0)
    source, digests = hashed(tmp_path)
    write(tmp_path, 100)
    with pytest.raises(SourceChanged) as error:
        scan = source.scan(digests)
        list(scan.reader.read(scan.candidates))
    assert str(error.value) == (
        f"The source changed while it was sharded: {key} has other content now; run the job again."
    )
    assert pickle.loads(pickle.dumps(error.value)).key == key  # as it comes from a worker


@pytest.mark.parametrize("key", READ_IN_PASS_2)
def test_a_file_that_changes_between_the_scan_and_the_reading(tmp_path: Path, key: str):
    write = WRITERS[key]
    write(tmp_path, 0)
    source, digests = hashed(tmp_path)
    scan = source.scan(digests)
    for replaced in (b"", b"junk", (tmp_path / key).read_bytes()[:-30]):
        (tmp_path / key).write_bytes(replaced)
        with pytest.raises(SourceChanged, match=f"{key} has other content now"):  # and nobody calls it damaged
            list(scan.reader.read(scan.candidates))
    (tmp_path / key).unlink()
    with pytest.raises(SourceChanged, match=f"{key} is gone"):
        list(scan.reader.read(scan.candidates))
    write(tmp_path, 0)  # the same bytes at another time
    assert len(list(scan.reader.read(scan.candidates))) == len(scan.candidates)


@pytest.mark.parametrize("key", ["x.parquet", IMAGES, "x.npz"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, key: str):
    WRITERS[key](tmp_path / "source", 0)
    WRITERS[key](tmp_path / "other", 100)
    source, digests = hashed(tmp_path / "source")
    scan = source.scan(digests)
    items = scan.reader.read(scan.candidates)
    next(items)
    os.replace(tmp_path / "other" / key, tmp_path / "source" / key)
    with pytest.raises(SourceChanged, match="has other content now"):
        list(items)


def test_a_file_that_was_replaced_with_its_old_time_is_hashed_again(tmp_path: Path):
    folder(tmp_path / "source", 0)
    path = tmp_path / "source/a/1.png"
    source, digests = hashed(tmp_path / "source")
    cache = HashCache(Directory(tmp_path / "store"), "here")
    for file in source.files:
        cache.put(file, digests[file.key])
    before = path.stat()
    time.sleep(0.02)  # more than a tick of the clock that file systems use
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    known = {file.key: cache.get(file) for file in hashed(tmp_path / "source")[0].files}
    assert known == {"a/1.png": None, "b/2.png": digests["b/2.png"]}


def test_what_is_forgotten_is_hashed_again(tmp_path: Path):
    folder(tmp_path / "source", 0)
    source, digests = hashed(tmp_path / "source")
    cache = HashCache(Directory(tmp_path / "store"), "here")
    for file in source.files:
        cache.put(file, digests[file.key])
    cache.forget("a/1.png")
    cache.forget("never seen")
    cache.save()
    again = HashCache(Directory(tmp_path / "store"), "here")
    assert [again.get(file) for file in source.files] == [None, digests["b/2.png"]]
