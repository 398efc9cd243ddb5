"""From a source to a dataset version, without Ray: splits, order, rejects, threshold, and the name of the version."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_core.config import UserError
from diffusion_core.data import sharding
from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.data.hashing import HashCache, hash_files
from diffusion_core.data.sharding import make_plan, make_shard
from diffusion_core.data.shards import open_dataset
from diffusion_core.data.sources import base, open_source
from diffusion_core.data.sources.digits import digits_from_uint8
from diffusion_core.data.spool import positions_of_items, spool_chunk, spool_chunks
from diffusion_core.data.transforms import Transform
from diffusion_core.store import Directory
from tests.image_files import BROKEN, encoded, pixels, shard_here, write_images, write_parquet


def config(**options) -> DatasetConfig:
    return DatasetConfig(name="x", **({"image_size": 8} | options))


def folder(root: Path, images: int = 40) -> Path:
    return write_images(
        root, [f"{'cat' if i % 2 else 'dog'}/{i:03d}.{'jpg' if i % 5 == 0 else 'png'}" for i in range(images)]
    )


def every_row(dataset):
    """{key: (split, pixels, label name, text)}"""
    rows = {}
    for split in dataset.splits:
        batch = dataset.read(split)
        for i, key in enumerate(batch.keys):
            assert key not in rows
            label = None if batch.labels is None else dataset.class_names[batch.labels[i]]
            rows[key] = (split, batch.images[i], label, batch.text[i] if batch.text else None)
    return rows


def test_every_image_becomes_its_row(tmp_path):
    root = folder(tmp_path / "source")
    dataset = shard_here(tmp_path, SourceConfig(uri=str(root)), config(rows_per_shard=7, test_fraction=0.25))
    rows, transform = every_row(dataset), Transform(config(), (8, 8))
    assert len(rows) == 40 and dataset.splits == {"train": 30, "test": 10} and dataset.class_names == ["cat", "dog"]
    for key, (_, image, label, _) in rows.items():
        np.testing.assert_array_equal(image, transform((root / key).read_bytes()))
        assert label == key.partition("/")[0]
    assert [shard["rows"] for shard in dataset.manifest["shards"]] == [6, 6, 6, 6, 6, 5, 5]
    keys = dataset.read("train").keys
    assert keys != sorted(keys)
    assert not dataset.rejected()


def test_order_and_held_out_images_depend_on_the_seed_alone(tmp_path):
    root = folder(tmp_path / "source")
    made = [
        shard_here(tmp_path / str(i), SourceConfig(uri=str(root)), config(seed=seed))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert made[0].manifest == made[1].manifest
    assert set(made[0].read("test").keys) != set(made[2].read("test").keys)
    assert made[0].read("train").keys != made[2].read("train").keys


def test_broken_items_are_rejected_with_reasons_and_the_rest_is_kept(tmp_path):
    root = folder(tmp_path / "source")
    for name, (content, _) in BROKEN.items():
        (root / "cat" / name).write_bytes(content)
    dataset = shard_here(tmp_path, SourceConfig(uri=str(root)), config(max_rejected_fraction=0.2))
    assert set(every_row(dataset)) == {f"{p.parent.name}/{p.name}" for p in root.rglob("[0-9]*")}
    rejected = dict(dataset.rejected())
    assert set(rejected) == {f"cat/{name}" for name in BROKEN}
    assert all(reason in rejected[f"cat/{name}"] for name, (_, reason) in BROKEN.items())
    assert dataset.manifest["rejected"] == {"file": "rejected.parquet", "rows": len(BROKEN)}


def test_too_many_rejects_fail_with_the_reasons(tmp_path):
    root = folder(tmp_path / "source", 20)
    for i in range(3):
        (root / "cat" / f"empty{i}.png").write_bytes(b"")
    (root / "cat" / "words.png").write_text("words")
    with pytest.raises(UserError) as error:
        shard_here(tmp_path, SourceConfig(uri=str(root)), config())
    assert str(error.value).startswith(
        "4 of 24 images were rejected, and dataset.max_rejected_fraction = 0.05 allows 1; most common: empty (3), "
        "not an image in any format that Pillow knows (1). All of them with their reasons are in "
    )
    place = Path(str(error.value).rpartition(" in ")[2].rstrip("."))
    assert place.name == "rejected.parquet" and place.exists() and not (place.parent / "manifest.json").exists()
    with pytest.raises(UserError, match="is not a dataset version"):
        open_dataset(str(place.parent))
    shard_here(tmp_path, SourceConfig(uri=str(root)), config(max_rejected_fraction=0.2))


def test_nothing_but_rejects_is_an_error_whatever_the_threshold(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    (root / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 images were rejected"):
        shard_here(tmp_path, SourceConfig(uri=str(root)), config(max_rejected_fraction=1))
    with pytest.raises(UserError, match="image_size is needed: none of the first 100"):
        shard_here(tmp_path, SourceConfig(uri=str(root)), config(image_size=None))


def test_without_a_size_the_first_good_image_gives_it(tmp_path):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(1, 30)])
    (root / "0.png").write_bytes(b"")
    (root / "9.png").write_bytes(encoded(pixels(0, 13, 12)))
    dataset = shard_here(tmp_path, SourceConfig(uri=str(root)), config(image_size=None, max_rejected_fraction=0.1))
    assert dataset.image_shape == (12, 12, 3)
    assert dict(dataset.rejected())["9.png"] == "12x13 pixels, and the first image has 12x12"


def test_splits_of_the_source_are_kept(tmp_path):
    root = write_images(
        tmp_path / "source", [f"{split}/{i}.png" for split in ("train", "val", "test") for i in range(9)]
    )
    dataset = shard_here(tmp_path, SourceConfig(uri=str(root)), config())
    assert dataset.splits == {"train": 9, "validation": 9, "test": 9}
    assert all(
        split == {"val": "validation"}.get(key.partition("/")[0], key.partition("/")[0])
        for key, (split, *_) in every_row(dataset).items()
    )
    mixed = shard_here(tmp_path, SourceConfig(uri=str(root), splits="none"), config(test_fraction=1 / 3))
    assert mixed.splits == {"train": 18, "test": 9} and mixed.class_names == ["test", "train", "val"]
    only = write_images(tmp_path / "only", ["test/1.png", "test/2.png"])
    with pytest.raises(UserError, match=r"no training images, only test images: set source\.splits to none"):
        shard_here(tmp_path, SourceConfig(uri=str(only)), config())


@pytest.mark.parametrize(
    ("images", "fraction", "test"), [(40, 0.0, 0), (40, 0.1, 4), (3, 0.1, 1), (1, 0.5, 0), (2, 0.9, 1)]
)
def test_the_share_that_is_held_out(tmp_path, images, fraction, test):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(images)])
    dataset = shard_here(tmp_path, SourceConfig(uri=str(root)), config(test_fraction=fraction))
    assert (dataset.num_rows("train"), dataset.num_rows("test")) == (images - test, test)


def test_captions_travel_with_their_images(tmp_path):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(20)])
    (root / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,it is {i}\n" for i in range(20)))
    dataset = shard_here(tmp_path, SourceConfig(uri=str(root)), config(rows_per_shard=3))
    assert dataset.has_text and not dataset.class_names
    assert all(text == f"it is {key[:-4]}" for key, (_, _, _, text) in every_row(dataset).items())


def test_the_digits_come_through_exactly(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = shard_here(tmp_path, SourceConfig(kind="digits"), config(channels=1))
    assert dataset.splits == {"train": 1617, "test": 180}
    for key, (_, image, label, _) in every_row(dataset).items():
        row = int(key.partition("#")[2])
        np.testing.assert_array_equal(digits_from_uint8(image[:, :, 0]), digits.images[row])
        assert label == str(digits.target[row])


def test_the_spool_gives_the_same_shards_as_the_source(tmp_path, monkeypatch):
    images = [encoded(pixels(i)) if i % 9 else [b"", None][i % 2] for i in range(60)]
    root = tmp_path / "source"
    write_parquet(root / "a.parquet", images[:20], label=[i % 3 for i in range(20)], text=[f"{i}" for i in range(20)])
    write_parquet(root / "b.parquet", images[20:], label=[i % 3 for i in range(40)], text=[f"{i}" for i in range(40)])
    options = config(rows_per_shard=11, max_rejected_fraction=0.5)
    direct = shard_here(tmp_path / "direct", SourceConfig(uri=str(root)), options)

    def spooled(directory, scan, options):
        plan = make_plan(directory, scan, options)
        assert spool_chunks(plan.reader, 10_000, len(plan.shards)) == []
        chunks = spool_chunks(plan.reader, 1 << 40, len(plan.shards))
        assert len(chunks) == 2 and [n for chunk in chunks for n in chunk] == list(range(60))
        for number, chunk in enumerate(chunks):
            spool_chunk(plan.directory, plan.reader, positions_of_items(plan.order), number, chunk)
        monkeypatch.setattr(type(plan.reader), "read", None)  # the source is not needed any more
        return replace(plan, spooled=len(chunks))

    other = shard_here(tmp_path / "spooled", SourceConfig(uri=str(root)), options, spooled)
    assert other.manifest == direct.manifest and other.rejected() == direct.rejected()


def test_arrays_pass_through_the_spool(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.stack([pixels(i, 8, 8, 1) for i in range(20)]))
    source = open_source(SourceConfig(uri=str(tmp_path / "x.npz")))
    scan = source.scan({"x.npz": "0" * 64})
    plan = make_plan(Directory(tmp_path / "v"), scan, config(channels=1, test_fraction=0))
    positions = positions_of_items(plan.order)
    spool_chunk(plan.directory, plan.reader, positions, 0, range(20))
    spool_chunk(plan.directory, None, positions, 0, range(20))  # done: the source is not read
    plain = {item.slot: (item.key, item.content.tolist()) for item in plan.items(0, 20)}
    again = {item.slot: (item.key, item.content.tolist()) for item in replace(plan, spooled=1).items(0, 20)}
    assert plain == again and len(plain) == 20


def version_of(root, tmp_path, source=None, **options) -> str:
    return shard_here(tmp_path / "store", SourceConfig(uri=str(root), **source or {}), config(**options)).version


def test_the_version_names_content_and_identity_and_nothing_else(tmp_path):
    root = folder(tmp_path / "source", 8)
    first = version_of(root, tmp_path)
    assert version_of(root, tmp_path, {"kind": "folder"}, max_rejected_fraction=0.9) == first
    moved = root.rename(tmp_path / "elsewhere")
    os.utime(moved / "cat/001.png", (1, 1))
    assert version_of(moved, tmp_path) == first
    seen = {first}
    for change in (
        lambda: version_of(moved, tmp_path, seed=1),
        lambda: version_of(moved, tmp_path, filter="box"),
        lambda: version_of(moved, tmp_path, {"labels": "none"}),
        lambda: ((moved / "cat/001.png").write_bytes(encoded(pixels(99))), version_of(moved, tmp_path))[1],
        lambda: ((moved / "cat/001.png").rename(moved / "dog/001.png"), version_of(moved, tmp_path))[1],
        lambda: ((moved / "dog/new.png").write_bytes(encoded(pixels(98))), version_of(moved, tmp_path))[1],
    ):
        version = change()
        assert version not in seen
        seen.add(version)


def test_unchanged_files_are_not_read_again(tmp_path):
    root = folder(tmp_path / "source", 6)
    source = open_source(SourceConfig(uri=str(root)))
    cache = HashCache(Directory(tmp_path / "store"), str(root))
    assert [cache.get(file) for file in source.files] == [None] * 6
    for file, (_, sha256, _) in zip(source.files, hash_files(source, source.files), strict=True):
        cache.put(file, sha256)
    cache.save()
    other = HashCache(Directory(tmp_path / "store"), "elsewhere")
    other.put(source.files[0], "f" * 64)
    other.save()
    (root / "cat/001.png").write_bytes(encoded(pixels(50)))
    again = HashCache(Directory(tmp_path / "store"), str(root))
    known = {file.key: again.get(file) for file in open_source(SourceConfig(uri=str(root))).files}
    assert known.pop("cat/001.png") is None and all(known.values())
    (tmp_path / "store/source-hashes.parquet").write_bytes(b"junk")
    assert HashCache(Directory(tmp_path / "store"), str(root)).get(source.files[0]) is None


def test_a_file_that_cannot_be_read_is_a_reject(tmp_path, monkeypatch):
    root = folder(tmp_path / "source", 30)
    real = base.hash_file

    def failing(place, file):
        if file.key == "cat/003.png":
            raise PermissionError(13, "Permission denied")
        return real(place, file)

    monkeypatch.setattr(base, "hash_file", failing)
    dataset = shard_here(tmp_path, SourceConfig(uri=str(root)), config())
    assert dict(dataset.rejected()) == {"cat/003.png": "unreadable: Permission denied"}


def test_a_second_attempt_leaves_a_finished_shard_alone(tmp_path):
    root = folder(tmp_path / "source", 20)
    source = open_source(SourceConfig(uri=str(root)))
    digests = {key: sha256 for key, sha256, _ in hash_files(source, source.files)}
    plan = make_plan(Directory(tmp_path / "v"), source.scan(digests), config(rows_per_shard=5))
    first = make_shard(plan, 1)
    assert sharding.finished_shards(plan) == {1: json.loads(json.dumps(first))}
    stamp = (tmp_path / "v/shards/part-00001.parquet").stat().st_mtime_ns
    assert make_shard(plan, 1) == first
    assert (tmp_path / "v/shards/part-00001.parquet").stat().st_mtime_ns == stamp
