"""Extensions of a set and their shards: any history of requests plans every image id once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.generation.plan import Extension, extend, read_extensions, uncovered
from diffusion_core.storage import Directory


def nothing_unfinished(log):
    return None


def request(directory, first, count, unfinished=nothing_unfinished, images_per_shard=10):
    return extend(directory, images_per_shard, first, count, unfinished)


@given(first=st.integers(0, 500), count=st.integers(1, 300), size=st.integers(1, 64), number=st.integers(0, 9))
def test_shards_tile_their_extension_and_are_cut_at_multiples(first, count, size, number):
    extension = Extension(0, first, count, number)
    shards = extension.shards(size)
    ids = [image_id for shard in shards for image_id in range(shard.first_image_id, shard.stop)]
    assert ids == list(range(first, first + count))
    assert [shard.number for shard in shards] == list(range(number, number + extension.shard_count(size)))
    assert all(shard.first_image_id % size == 0 for shard in shards[1:])
    assert all(extension.shard_of(image_id, size) in shards for image_id in ids)


@settings(max_examples=30, deadline=None)
@given(requests=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 80)), min_size=1, max_size=8))
def test_any_history_plans_every_id_once_and_numbers_shards_without_gap(tmp_path_factory, requests):
    directory = Directory(tmp_path_factory.mktemp("set"))
    for first, count in requests:
        got_first, stop, touched = request(directory, first, count)
        assert (got_first, stop) == (first, first + count)
        assert not list(uncovered(touched, first, stop))
    log = read_extensions(directory)
    shards = [shard for item in log for shard in item.shards(10)]
    ids = [image_id for shard in shards for image_id in range(shard.first_image_id, shard.stop)]
    assert len(ids) == len(set(ids))
    assert set(ids) == {image_id for first, count in requests for image_id in range(first, first + count)}
    assert [shard.number for shard in shards] == list(range(len(shards)))


def test_without_a_first_id_the_next_ids_are_planned(tmp_path):
    directory = Directory(tmp_path)
    assert request(directory, None, 25)[:2] == (0, 25)
    assert request(directory, None, 10)[:2] == (25, 35)
    assert request(directory, 100, 5)[:2] == (100, 105)
    assert request(directory, None, 10)[:2] == (105, 115)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(25, (0, 25)), (10, (0, 25)), (40, (0, 40))],
    ids=["same count: the same work", "smaller: all of what was begun", "larger: and what it exceeds it by"],
)
def test_an_unfinished_extension_is_taken_up_first(tmp_path, count, expected):
    directory = Directory(tmp_path)
    request(directory, None, 25)
    assert request(directory, None, count, unfinished=lambda log: log[0])[:2] == expected


def test_many_at_once_agree_on_one_log(tmp_path):
    directory = Directory(tmp_path)
    firsts = [0, 0, 30, 30, 15, 40, 0, 60]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda first: request(directory, first, 50), firsts))
    shards = [shard for item in read_extensions(directory) for shard in item.shards(10)]
    ids = sorted(image_id for shard in shards for image_id in range(shard.first_image_id, shard.stop))
    assert ids == list(range(110))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert not list(Path(tmp_path).rglob(".tmp-*"))
