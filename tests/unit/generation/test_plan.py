"""Extensions of a set and their shards: any history of requests plans every image id once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.generation.plan import Extension, extend, look, read_extensions, uncovered
from diffusion_core.store import Directory


def nothing(log):
    return []


def everything(log):
    return log


def request(directory, first, count, unfinished=nothing, images_per_shard=10):
    return extend(directory, images_per_shard, first, count, unfinished)


def id_range(wanted):
    return wanted.first, wanted.stop


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
        planned = request(directory, first, count)
        assert id_range(planned) == (first, first + count)
        assert not list(uncovered(planned.extensions, first, first + count))
    log = read_extensions(directory)
    shards = [shard for item in log for shard in item.shards(10)]
    ids = [image_id for shard in shards for image_id in range(shard.first_image_id, shard.stop)]
    assert len(ids) == len(set(ids))
    assert set(ids) == {image_id for first, count in requests for image_id in range(first, first + count)}
    assert [shard.number for shard in shards] == list(range(len(shards)))


def test_without_a_first_id_the_next_ids_are_planned(tmp_path):
    directory = Directory(tmp_path)
    assert id_range(request(directory, None, 25)) == (0, 25)
    assert id_range(request(directory, None, 10)) == (25, 35)
    assert id_range(request(directory, 100, 5)) == (100, 105)
    assert id_range(request(directory, None, 10)) == (105, 115)


@pytest.mark.parametrize(
    ("count", "expected", "continues"),
    [(25, (0, 25), True), (10, (25, 35), False), (40, (25, 65), False)],
    ids=["same count: the same work", "smaller: new ids", "larger: new ids"],
)
def test_an_unfinished_extension_is_taken_up_by_the_request_that_made_it(tmp_path, count, expected, continues):
    directory = Directory(tmp_path)
    request(directory, None, 25)
    again = request(directory, None, count, unfinished=everything)
    assert (id_range(again), again.continues) == (expected, continues)


def test_of_several_unfinished_extensions_each_is_found_by_its_count(tmp_path):
    directory = Directory(tmp_path)
    for count in (25, 10, 40):
        request(directory, None, count, unfinished=everything)
    assert [id_range(request(directory, None, count, unfinished=everything)) for count in (40, 25, 10)] == [
        (35, 75),
        (0, 25),
        (25, 35),
    ]
    assert not request(directory, 0, 25, unfinished=everything).continues, "a request that names its ids is not told"


def test_looking_plans_nothing(tmp_path):
    directory = Directory(tmp_path)
    request(directory, 0, 10)
    wanted = look(directory, 5, 20, nothing)
    assert (id_range(wanted), wanted.gaps, len(wanted.extensions)) == ((5, 25), [(10, 25)], 1)
    assert len(read_extensions(directory)) == 1


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
