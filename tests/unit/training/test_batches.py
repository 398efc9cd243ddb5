"""Microbatches: a fixed list, dealt over any number of processes, with everything random keyed by run position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_core.data import Loader, open_dataset
from diffusion_core.diffusion import make_schedule
from diffusion_core.training.batches import Batches, deal
from diffusion_core.training.config import TrainingConfig
from diffusion_core.training.world import World
from tests.toy_training import CLASSES, toy_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(toy_dataset(str(tmp_path_factory.mktemp("data"))))


@pytest.mark.parametrize("batch_size", [1, 7, 10, 64])
@pytest.mark.parametrize("microbatch_size", [1, 3, 4, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_image_is_dealt_once(batch_size, microbatch_size, size):
    dealt = [piece for rank in range(size) for piece in deal(batch_size, microbatch_size, rank, size)]
    counted = [(first, last) for first, last, weight in dealt if weight]
    assert all(weight in (0.0, 1.0) for _, _, weight in dealt)
    seen = sorted(place for first, last in counted for place in range(first, last))
    assert seen == list(range(batch_size))
    alone = [(first, last) for first, last, _ in deal(batch_size, microbatch_size, 0, 1)]
    assert sorted(counted) == alone, "the list of microbatches depends on the number of processes"
    per_rank = [len(deal(batch_size, microbatch_size, rank, size)) for rank in range(size)]
    assert min(per_rank) >= 1 and max(per_rank) - min(per_rank) <= 1


def by_position(dataset, size, images_seen=70, **changes):
    """Position → (x0, noise, t, label) over all ranks of a world."""
    config = TrainingConfig(batch_size=50, microbatch_size=8, **changes)
    found = {}
    for rank in range(size):
        loader = Loader(dataset, "train", config.seed)
        batches = Batches(loader, config, World(rank, size), CLASSES, make_schedule("linear").training_times)
        for one in batches.microbatches(images_seen, batches.fetch(images_seen)):
            if one.weight:
                for row in range(len(one.x0)):
                    values = (one.x0[row], one.noise[row], one.t[row], one.label[row])
                    assert one.first + row not in found
                    found[one.first + row] = values
        batches.close()
    return found


@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_any_world_sees_the_same(dataset, size):
    alone, together = by_position(dataset, 1), by_position(dataset, size)
    assert sorted(alone) == sorted(together) == list(range(70, 120))
    for position, values in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(values, together[position], strict=True))


def test_reading_ahead_changes_nothing(dataset):
    config = TrainingConfig(batch_size=10, microbatch_size=10)
    batches = Batches(Loader(dataset, "train", 0), config, World(), CLASSES, make_schedule("linear").training_times)
    forwards = [batches.fetch(seen).images for seen in (0, 10, 20, 30)]
    jumped = batches.fetch(10).images
    batches.close()
    assert np.array_equal(jumped, forwards[1])


def test_noise_is_new_in_each_epoch_while_images_come_back(dataset):
    first, second = by_position(dataset, 1, 0), by_position(dataset, 1, 100)
    pictures = {values[0].numpy().tobytes() for values in first.values()}
    assert len(pictures & {values[0].numpy().tobytes() for values in second.values()}) > 10
    assert not {values[1].numpy().tobytes() for values in first.values()} & {
        values[1].numpy().tobytes() for values in second.values()
    }


def test_labels_are_dropped_at_the_rate_asked_for(dataset):
    def labels(rate):
        batches = (by_position(dataset, 1, seen, label_dropout=rate) for seen in range(0, 2000, 50))
        return {position: int(values[3]) for batch in batches for position, values in batch.items()}

    kept, some = labels(0), labels(0.2)
    assert CLASSES not in kept.values()
    dropped = [position for position, label in some.items() if label == CLASSES]
    assert 0.17 < len(dropped) / len(some) < 0.23
    assert all(some[position] == kept[position] for position in some if position not in set(dropped))


def test_half_of_the_images_are_mirrored_and_the_choice_is_kept(dataset):
    plain, flipped = by_position(dataset, 1), by_position(dataset, 2, horizontal_flip=True)
    mirrored = [p for p in plain if torch.equal(flipped[p][0], plain[p][0].flip(-1))]
    same = [p for p in plain if torch.equal(flipped[p][0], plain[p][0])]
    assert len(mirrored) + len(same) == len(plain) and 10 < len(mirrored) < 40


def test_another_seed_is_another_stream(dataset):
    one, other = by_position(dataset, 1, seed=0), by_position(dataset, 1, seed=1)
    assert not any(torch.equal(one[p][1], other[p][1]) for p in one)
