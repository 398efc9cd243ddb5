"""What may go from a store, what may not, and what is left when the deletion is cut short."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from diffusion_core.catalog import find, prune
from diffusion_core.catalog.prune import Retention
from diffusion_core.config import UserError
from diffusion_core.store import Directory
from diffusion_core.store.lease import claim
from tests.small_store import SmallStore, name_of

EVERYTHING = Retention(older_than_s=3600, unused=True)


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


def going(small: SmallStore, retention: Retention = EVERYTHING) -> set[str]:
    return {row.thing for row in prune.plan(small.uri, retention) if row.goes}


def why(small: SmallStore, key: str) -> str:
    return {row.thing: row.why for row in prune.plan(small.uri, EVERYTHING)}[key]


def test_what_a_kept_thing_needs_is_kept(small):
    """A set for use, its run, the runs that this one and its guides began with, and all of their data."""
    for word in ("data", "old data", "guide data", "unused data"):
        small.dataset(word)
    grandparent = small.run("grandparent", "old data")
    small.run("parent", "data", start="grandparent")
    small.run("child", "data", start="parent")
    small.run("guide", "guide data")
    small.run("judge", "data")
    small.run("classifier", "data")
    alone = small.run("alone", "old data", start="parent")
    small.images("set", "child", "data", guide="guide")
    measured = small.evaluation("figures", "child", "data", images="samples", guide="judge")
    samples = small.images("samples", "child", "data")
    small.comparison("bench", "child", "data", guide="classifier")
    unused = [
        small.evaluation("other figures", "alone", "data", images="other samples"),
        small.images("other samples", "alone", "data"),
        small.comparison("other bench", "alone", "data", guide="guide"),
    ]
    small.age(days=2)
    assert going(small) == {alone, *unused, f"datasets/digits/{name_of('unused data')}"}
    assert why(small, grandparent) == f"needed by runs/{name_of('parent')}"
    assert why(small, samples) == f"needed by {measured}"
    assert going(small, Retention(older_than_s=3600)) == set(), "without being asked nothing but files of jobs goes"


def test_an_age_counts_from_the_last_change(small):
    small.dataset("data")
    run = small.run("run", "data")
    small.age(days=10)
    assert going(small, Retention(9 * 86400, unused=True)) == {run, f"datasets/digits/{name_of('data')}"}
    assert going(small, Retention(11 * 86400, unused=True)) == set()
    small.root.write(f"{run}/metrics.jsonl", b"more")
    assert going(small, Retention(9 * 86400, unused=True)) == set(), "and the data of a young run stays"


def test_what_is_registered_stays(small):
    from diffusion_core.tracking.connection import client

    small.dataset("data")
    run = small.run("run", "data")
    small.dataset("other")
    registry = client(small.uri)
    registry.create_registered_model("digits")
    tags = {"run_id": name_of("run"), "dataset": "digits", "dataset_version": name_of("data")}
    registry.create_model_version("digits", source=small.uri, tags=tags)
    registry.set_registered_model_alias("digits", "champion", "1")
    small.age(days=2)
    assert going(small) == {f"datasets/digits/{name_of('other')}"}
    assert why(small, run) == "registered as digits/1 (champion)"


HOLDER = """
import sys, time
from diffusion_core.store import Directory
from diffusion_core.store.lease import claim
claim(Directory(sys.argv[1]), {}, beat_s=0.1)
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_trains_is_left_alone_until_that_is_killed(small):
    """Neither it, nor its data, nor the model that it began with; a first claim that ended long ago changes nothing."""
    small.dataset("data")
    small.run("parent", "data")
    run = small.run("run", "data", start="parent", bundle=False)
    claim(small.root / f"{run}/attempts", {}).end()
    small.age(days=40)
    everything = {run, f"runs/{name_of('parent')}", f"datasets/digits/{name_of('data')}"}
    planned = prune.plan(small.uri, EVERYTHING)
    assert {row.thing for row in planned if row.goes} == everything
    place = f"{small.uri}/{run}/attempts"
    with subprocess.Popen([sys.executable, "-c", HOLDER, place], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            small.age(days=40)
            assert why(small, run) == "somebody works on it" and going(small) == set()
            kept = prune.apply(small.uri, planned, EVERYTHING)
            assert {row.thing for row in kept if not row.goes} == everything
            assert all("used meanwhile" in row.why for row in kept)
        finally:
            holder.kill()
    small.age(days=40)
    prune.apply(small.uri, prune.plan(small.uri, EVERYTHING), EVERYTHING)
    assert [entry.key for entry in small.root.list()] == []


@pytest.mark.parametrize("user", ["job", "images", "turn"])
def test_what_is_used_between_plan_and_deletion_stays(small, user):
    data = small.dataset("data")
    run = small.run("run", "data")
    small.age(days=2)
    planned = prune.plan(small.uri, EVERYTHING)
    assert going(small) == {run, data}
    if user == "job":
        small.job("generate-1", {"model": f"{small.uri}/{run}/bundles/64"}, ended=False)
        small.job("train-1", {"dataset_uri": f"{small.uri}/{data}"}, ended=False)
    else:
        key = small.images("set", "run", "data")
        if user == "turn":
            claim(small.root / f"leases/generate/{name_of('set')}/0-100", {})
        assert key in why(small, run)
    done = prune.apply(small.uri, planned, EVERYTHING)
    assert [row.goes for row in done] == [False, False] and find.run(name_of("run"), small.uri)


def test_what_ended_jobs_left_goes_and_what_others_hold_stays(small):
    ended, running = small.job("shard-1", {}), small.job("shard-2", {}, ended=False)
    turn, held = (small.root / f"leases/shard/digits/{number}" for number in (1, 2))
    claim(turn, {}).end()
    claim(held, {})
    small.age(days=2)
    assert going(small, Retention(3600)) == {ended, "leases/shard/digits/1"}
    prune.apply(small.uri, prune.plan(small.uri, Retention(3600)), Retention(3600))
    assert {entry.key.rpartition("/")[0] for entry in small.root.list()} == {running, "leases/shard/digits/2"}
    assert claim(turn, {}).number == 1


class Cut(Exception):
    """The machine is gone."""


def test_a_deletion_that_is_cut_short_anywhere_leaves_nothing_that_reads_as_whole(small, monkeypatch):
    """After any number of files; and doing it again ends it."""
    delete, lock = Directory.delete, threading.Lock()
    for cut in range(20):
        data, run = small.dataset("data"), small.run("run", "data")
        small.age(days=2)
        left = [cut]

        def some(place: Directory, key: str, left: list[int] = left) -> None:
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    raise Cut
            delete(place, key)

        monkeypatch.setattr(Directory, "delete", some)
        try:
            prune.apply(small.uri, prune.plan(small.uri, EVERYTHING), EVERYTHING)
        except Cut:
            pass
        else:
            assert [entry.key for entry in small.root.list()] == []
            return
        finally:
            monkeypatch.setattr(Directory, "delete", delete)
        for key, record, file in (
            (data, "manifest.json", "shards/part-00000.parquet"),
            (f"{run}/bundles/64", "bundle.json", "model.safetensors"),
        ):
            assert not small.root.exists(f"{key}/{record}") or small.root.exists(f"{key}/{file}")
        prune.apply(small.uri, prune.plan(small.uri, EVERYTHING), EVERYTHING)
        assert [entry.key for entry in small.root.list()] == []
    raise AssertionError("the deletion was never let through")


def test_a_registry_that_is_away_keeps_everything(small, monkeypatch):
    small.run("run", small.dataset("data"))
    small.age(days=2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        prune.plan(small.uri, EVERYTHING)
