"""Checkpoints: a record commits, digests decide, damage is passed over and replaced, the newest few are kept."""

from __future__ import annotations

import logging

import pytest
import torch

from diffusion_core.store import Directory, layout
from diffusion_core.training.checkpoint import (
    Checkpoint,
    checkpoints,
    load_newest,
    prune_checkpoints,
    save_checkpoint,
)


@pytest.fixture
def place(tmp_path):
    return Directory(tmp_path / "checkpoints")


def made(images_seen, value=None):
    tensor = torch.full((2, 3), float(images_seen if value is None else value))
    return Checkpoint(images_seen, {"network": {"weight": tensor}, "ema": {"weight": tensor + 1}}, {"seconds": 1.5})


def save(place, *numbers):
    for number in numbers:
        save_checkpoint(place, made(number))


def file_of(place, images_seen, part="network"):
    here = place / str(images_seen)
    return here.local_path / here.read_json(layout.CHECKPOINT)["files"][part]["file"]


def truncate(place):
    path = file_of(place, 300)
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(place):
    path = file_of(place, 300, "ema")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def remove_a_file(place):
    file_of(place, 300).unlink()


def empty_the_record(place):
    (place.local_path / "300" / layout.CHECKPOINT).write_text("")


def forget_the_digest(place):
    record = place.read_json(f"300/{layout.CHECKPOINT}")
    del record["files"]["network"]["sha256"]
    place.write_json(f"300/{layout.CHECKPOINT}", record)


DAMAGES = [truncate, flip_a_bit, remove_a_file, empty_the_record, forget_the_digest]


def test_what_is_saved_is_loaded(place):
    assert load_newest(place) is None
    save(place, 90, 1000, 200)
    loaded = load_newest(place)
    assert loaded is not None and loaded.images_seen == 1000, "numbers are compared, not names"
    assert loaded.meta == {"seconds": 1.5}
    assert torch.equal(loaded.parts["ema"]["weight"], made(1000).parts["ema"]["weight"])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_passed_over_with_a_warning_and_replaced(place, damage, caplog):
    save(place, 100, 200, 300)
    damage(place)
    with caplog.at_level(logging.WARNING):
        loaded = load_newest(place)
    assert loaded is not None and loaded.images_seen == 200
    assert "300 is damaged" in caplog.text
    save(place, 300)
    again = load_newest(place)
    assert again is not None and again.images_seen == 300


def test_an_interrupted_one_is_passed_over_silently(place, caplog):
    save(place, 100, 200)
    place.delete(f"200/{layout.CHECKPOINT}")
    loaded = load_newest(place)
    assert loaded is not None and loaded.images_seen == 100
    assert not caplog.text
    save(place, 200)
    assert checkpoints(place) == [100, 200]


def test_a_sound_one_is_left_as_it_is(place):
    save(place, 100)
    save_checkpoint(place, made(100, value=7))
    loaded = load_newest(place)
    assert loaded is not None and float(loaded.parts["network"]["weight"][0, 0]) == 100.0


def test_the_newest_are_kept(place):
    save(place, 100, 200, 300, 400)
    place.write("150/half.safetensors", b"of an interrupted one")
    prune_checkpoints(place, keep=2, newest=400)
    assert checkpoints(place) == [300, 400]
    assert place.children() == ["300", "400"]


def test_a_damaged_remain_from_further_on_never_costs_the_good_ones(place):
    """An attempt came to 300 and its checkpoints were damaged; a new one starts from 0 and keeps only one."""
    save(place, 300)
    flip_a_bit(place)
    save(place, 100)
    prune_checkpoints(place, keep=1, newest=100)
    loaded = load_newest(place)
    assert loaded is not None and loaded.images_seen == 100


def test_a_store_that_is_away_is_not_taken_for_damage(place, monkeypatch):
    save(place, 100)

    def away(self, key):
        raise ConnectionError("the store is away")

    monkeypatch.setattr(Directory, "read", away)
    with pytest.raises(ConnectionError):
        load_newest(place)
