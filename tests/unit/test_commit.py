"""Records: what they look like stays, older ones are read, newer ones are refused with a sentence."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_core.bundle import BundleConfig, DatasetReference, save_bundle
from diffusion_core.config import UserError
from diffusion_core.data.shards import commit_dataset
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.generation.imageset import ImageSet, SetDescription
from diffusion_core.networks.config import UNetConfig
from diffusion_core.store import Directory
from diffusion_core.store.commit import Damaged, NoRecord, RecordKind, create_or_read, read_recorded, sha256
from diffusion_core.training.checkpoint import Checkpoint, save_checkpoint


def _dataset(store: Directory) -> bytes:
    place = store / "datasets/toys/0a1b"
    shard = {"file": "shards/part-00000.parquet", "split": "train", "rows": 2}
    shard |= {"bytes": 9, "sha256": "0" * 64, "memory_bytes": 8}
    commit_dataset(
        place,
        version="0a1b",
        image_shape=(2, 2, 1),
        class_names=["å"],
        shards=[shard],
        rejected=[("b", "too small")],
        source={"kind": "arrays"},
    )
    return place.read("manifest.json")


def _checkpoint(store: Directory) -> bytes:
    parts = {"ema": {"weight": torch.arange(6.0).reshape(2, 3)}, "network": {"weight": torch.ones(2)}}
    save_checkpoint(store, Checkpoint(128, parts, {"seconds": 1.5}))
    return store.read("128/record.json")


def _bundle(store: Directory) -> bytes:
    config = BundleConfig(
        process=ProcessConfig(),
        network=UNetConfig(),
        image_shape=(8, 8, 1),
        class_names=("å",),
        dataset=DatasetReference(name="toys", version="0a1b", uri="/nowhere"),
        run_id="0a1b",
        images_seen=128,
    )
    save_bundle(store, config, {"weight": torch.arange(6.0)}, b"\x89PNG")
    return store.read("bundle.json")


def _image_set(store: Directory) -> bytes:
    description = SetDescription(
        set_id="0a1b",
        bundle_uri="/nowhere",
        bundle_digest="c2d3",
        run_id="e4f5",
        dataset={"name": "toys", "version": "0a1b", "uri": "/nowhere"},
        generation={"seed": 3, "images_per_shard": 4, "batch_size": 4, "format": "png"},
        labels="balanced",
        class_names=("å", "b"),
        image_shape=(2, 2, 1),
    )
    images = ImageSet(store, description)
    (extension,) = images.extend(None, 4).extensions
    images.commit(extension.shards(4)[0], np.arange(16, dtype=np.uint8).reshape(4, 2, 2, 1), "c2d3", "cpu")
    assert images.finish(extension)
    keys = ("set.json", "extensions/00000.json", "shards/part-00000.json", "manifest-3.json")
    return b"".join(store.read(key) for key in keys)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_dataset, "32dcbef85f6e7534"),
        (_checkpoint, "fc86a9530a39006b"),
        (_bundle, "bf9bf1f04f19f0d6"),
        (_image_set, "57522f6f15f16b2c"),
    ],
)
def test_records_are_written_as_they_always_were(
    tmp_path: Path, make: Callable[[Directory], bytes], expected: str
) -> None:
    """Byte by byte, but for sizes and digests of files, which another version of an encoder may change."""
    masked = re.sub(rb'"bytes": \d+|"[0-9a-f]{64}"', b"_", make(Directory(tmp_path)))
    assert hashlib.sha256(masked).hexdigest()[:16] == expected


@pytest.fixture
def place(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "thing")


THING = RecordKind("thing.json", "a thing", schema_version=2)


def test_what_a_record_names_is_not_changed_by_who_comes_late(place: Directory) -> None:
    place.write("a", b"left by an interrupted attempt")
    THING.commit(place, {"a": b"first"}, {"name": "first"})
    assert place.read("a") == b"first" and THING.read(place) == {"schema_version": 2, "name": "first"}
    THING.commit(place, {"a": b"second", "b": b"new"}, {"name": "second"})
    assert place.read("a") == b"first" and THING.read(place)["name"] == "first"
    assert create_or_read(place, "a", b"third") == b"first" and create_or_read(place, "c", b"third") == b"third"


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        (None, NoRecord, r"thing is not a thing: there is no thing\.json in it\."),
        (b"{", NoRecord, r"thing is not a thing: its thing\.json cannot be read \("),
        (b"[]", NoRecord, r"thing is not a thing: its thing\.json cannot be read\."),
        (
            b'{"schema_version": 3}',
            UserError,
            r"was written by a newer version: .* version 3, and this one reads up to 2",
        ),
    ],
)
def test_what_is_no_record_is_told(
    place: Directory, content: bytes | None, kind: type[UserError], sentence: str
) -> None:
    if content is not None:
        place.write("thing.json", content)
    with pytest.raises(UserError, match=sentence) as caught:
        THING.read(place)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_older_records_are_read(place: Directory) -> None:
    place.write("thing.json", b'{"name": "old"}')
    assert THING.read(place) == {"name": "old"}


def test_a_file_is_compared_with_its_record(place: Directory) -> None:
    place.write("a", b"content")
    assert read_recorded(place, "a", sha256(b"content")) == b"content"
    with pytest.raises(Damaged, match=r"^a differs from what its record says$"):
        read_recorded(place, "a", sha256(b"other"))
    with pytest.raises(Damaged, match=r"^b is missing$"):
        read_recorded(place, "b", sha256(b"content"))
