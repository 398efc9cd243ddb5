"""The order of a training run: a function of (seed, dataset, position), the same from memory and from a stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from diffusion_core.config import UserError
from diffusion_core.data.loader import Loader
from diffusion_core.data.shards import Batch, ImageDataset, write_dataset
from diffusion_core.diffusion.noise import keyed_permutation

UNSHRUNK = (Phase.explicit, Phase.generate)  # every example writes a dataset: a smaller failure is not worth minutes


def numbered(tmp_path, rows: int, rows_per_shard: int, text: bool = False) -> ImageDataset:
    """A dataset in which image i is filled with the two bytes of i."""
    images = np.zeros((rows, 1, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(rows), 256)
    captions = [f"image {row}" for row in range(rows)] if text else None
    names = [str(name) for name in range(7)]
    rows_of = Batch(images, np.arange(rows) % 7, captions)
    return write_dataset(str(tmp_path), "numbered", {"train": rows_of}, names, rows_per_shard)


def numbers(batch: Batch) -> list[int]:
    return (batch.images[:, 0, 0, 0].astype(int) * 256 + batch.images[:, 0, 1, 0]).tolist()


def joined(lists: Iterable[Iterable[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def the_order(rows: int, per_shard: int, window: int, seed: int, epoch: int) -> list[int]:
    """The definition, written plainly."""
    shards = [list(range(first, min(first + per_shard, rows))) for first in range(0, rows, per_shard)]
    shuffled = [shards[i] for i in keyed_permutation(seed, f"data.shards.{epoch}", len(shards))]
    order = []
    for index, first in enumerate(range(0, len(shuffled), window)):
        mixed = joined(shuffled[first : first + window])
        order += [mixed[i] for i in keyed_permutation(seed, f"data.rows.{epoch}.{index}", len(mixed))]
    return order


@given(
    rows=st.integers(1, 60),
    per_shard=st.integers(1, 20),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
    cuts=st.lists(st.integers(0, 150), max_size=6),
)
@settings(max_examples=40, deadline=None, phases=UNSHRUNK)
def test_memory_and_stream_serve_the_defined_order(tmp_path_factory, rows, per_shard, window, seed, cuts):
    dataset = numbered(tmp_path_factory.mktemp("d"), rows, per_shard)
    wanted = joined(the_order(rows, per_shard, window, seed, epoch) for epoch in range(1 + 150 // rows))[:150]
    for budget in (1 << 30, 0):
        loader = Loader(dataset, seed=seed, window_shards=window, memory_budget_bytes=budget)
        assert loader.in_memory == (budget > 0)
        edges = [0, *sorted(cuts), 150]
        served = [loader.take(np.arange(a, b)) for a, b in itertools.pairwise(edges)]
        assert joined(numbers(batch) for batch in served) == wanted
        for batch in served:
            np.testing.assert_array_equal(batch.labels, np.array(numbers(batch), np.int64) % 7)
        loader.close()


@given(positions=st.lists(st.integers(0, 500), max_size=20), streamed=st.booleans())
@settings(max_examples=25, deadline=None, phases=UNSHRUNK)
def test_any_positions_in_any_order(tmp_path_factory, positions, streamed):
    dataset = numbered(tmp_path_factory.mktemp("d"), 47, 9, text=True)
    order = joined(the_order(47, 9, 2, 5, epoch) for epoch in range(11))
    loader = Loader(dataset, seed=5, window_shards=2, memory_budget_bytes=0 if streamed else 1 << 20)
    batch = loader.take(np.array(positions, np.int64))
    assert numbers(batch) == [order[position] for position in positions]
    assert batch.text == [f"image {order[position]}" for position in positions]
    loader.close()


def test_every_epoch_is_a_different_permutation(tmp_path):
    loader = Loader(numbered(tmp_path, 100, 10), seed=3)
    epochs = [numbers(loader.take(np.arange(100) + 100 * epoch)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Loader(loader.dataset, seed=4)
    assert numbers(other.take(np.arange(100))) != epochs[0]


def test_the_shares_of_workers_make_up_the_global_batch(tmp_path):
    dataset = numbered(tmp_path, 100, 10)
    whole = numbers(Loader(dataset, seed=1).take(np.arange(80, 144)))
    for world in (1, 2, 4):
        shares = [Loader(dataset, seed=1, memory_budget_bytes=0) for _ in range(world)]
        micro = [np.arange(80 + 8 * m, 88 + 8 * m) for m in range(8)]
        served = {m: numbers(shares[m % world].take(micro[m])) for m in range(8)}
        assert joined(served[m] for m in range(8)) == whole


def test_a_stream_holds_two_windows_and_reads_each_once(tmp_path, monkeypatch):
    dataset = numbered(tmp_path, 120, 10)
    reads: list[str] = []
    most = 0
    inner = ImageDataset.read_shard

    def counted(self, record, with_keys=True):
        reads.append(record["file"])
        return inner(self, record, with_keys)

    monkeypatch.setattr(ImageDataset, "read_shard", counted)
    loader = Loader(dataset, seed=0, window_shards=3, memory_budget_bytes=0)
    for first in range(0, 120, 8):
        loader.take(np.arange(first, first + 8))
        most = max(most, len(loader._stream._held))
    assert most == 2
    deadline = time.monotonic() + 5
    while len(reads) < 15 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(reads[:12]) == sorted(record["file"] for record in dataset.shards("train"))
    assert len(reads) == 15  # the first window of the next epoch is read ahead
    loader.close()
    assert not any(thread.is_alive() for thread in loader._stream._thread._threads)


def test_batches_own_their_memory(tmp_path):
    loader = Loader(numbered(tmp_path, 20, 10))
    batch = loader.take(np.arange(5))
    before = numbers(batch)
    batch.images[:] = 0
    assert numbers(loader.take(np.arange(5))) == before


def test_a_damaged_shard_stops_the_stream_with_a_sentence(tmp_path):
    dataset = numbered(tmp_path, 40, 10)
    (tmp_path / "datasets/numbered" / dataset.version / "shards/part-00002.parquet").write_bytes(b"PAR1")
    loader = Loader(dataset, memory_budget_bytes=0, window_shards=1)
    with pytest.raises(UserError, match=r"part-00002\.parquet cannot be read"):
        loader.take(np.arange(40))
    loader.close()
    with pytest.raises(UserError, match="no split 'test'"):
        Loader(dataset, "test")
