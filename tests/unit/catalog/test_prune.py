"""What may go from a store, what may not, and what is left when the deletion is cut short."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext

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
        assert key in why(small, run)
    turn = small.root / f"leases/generate/{name_of('set')}/0-100"
    with claim(turn, {}) if user == "turn" else nullcontext():
        done = prune.apply(small.uri, planned, EVERYTHING)
    assert [row.goes for row in done] == [False, False] and find.run(name_of("run"), small.uri)


def test_a_note_stays_while_what_it_is_about_stays(small):
    """Events told, who asked for new images, outcomes, watched sources: with their thing, and never before."""
    told = {"event": "diffusion.…", "once": name_of("data")}
    kept, lost = small.dataset("data"), small.dataset("other", name="cats")
    run, other_run = small.run("run", "data"), small.run("other", "data")
    images = small.images("set", "run", "data")
    small.root.write_json(f"{images}/extensions/00000.json", {"asked": "night-1"})
    notes = {
        "events/1.json": {**told, "resource": "diffusion.dataset.digits"},
        "events/2.json": {**told, "resource": f"diffusion.run.{name_of('run')}"},
        "events/3.json": {**told, "resource": f"diffusion.images.{name_of('set')}"},
        "events/4.json": {**told, "resource": f"diffusion.bundle.{small.digest('run')}"},
        "outcomes/digits/1.json": {"bundle": f"/where/it/was/{run}/bundles/64"},
        "asked/night-1.json": {"model": "models:/digits/1"},
        "watched/digits.json": {"version": "s"},
        f"bundles/{small.digest('run')}/bundle.json": {},
        "datasets/digits/source-hashes.parquet": {},
    }
    orphans = {
        "events/5.json": {**told, "resource": "diffusion.model.cats", "once": "1"},
        "events/6.json": {**told, "resource": f"diffusion.run.{name_of('other')}"},
        "outcomes/digits/2.json": {"bundle": f"/where/it/was/{other_run}/bundles/64"},
        "asked/night-2.json": {"model": "models:/digits/1"},
        "watched/cats.json": {"version": "s"},
        f"bundles/{small.digest('other')}/bundle.json": {},
        "gates/cats/approvals/1/question.json": {},
    }
    for key, record in {**notes, **orphans}.items():
        small.root.write_json(key, record)
    small.age(days=2)
    small.root.write_json("events/7.json", {**told, "resource": "diffusion.model.cats"})
    folders = {f"bundles/{small.digest('other')}", "gates/cats"}
    files = {key for key in orphans if not any(key.startswith(folder) for folder in folders)}
    assert going(small) == {lost, other_run, *files, *folders}
    prune.apply(small.uri, prune.plan(small.uri, EVERYTHING), EVERYTHING)
    assert {*notes, "events/7.json"} <= {entry.key for entry in small.root.list()}
    assert not {*orphans} & {entry.key for entry in small.root.list()} and small.root.exists(f"{kept}/manifest.json")
    small.root.delete(f"{images}/set.json")  # nothing is for use any more
    small.age(days=2)
    prune.apply(small.uri, prune.plan(small.uri, EVERYTHING), EVERYTHING)
    assert [entry.key for entry in small.root.list()] == []


def test_notes_about_a_registered_model_stay(small):
    from diffusion_core.tracking.connection import client

    registry = client(small.uri)
    registry.create_registered_model("digits")
    registry.create_model_version("digits", source=small.uri)
    kept = {"gates/digits/1.json", "events/1.json"}
    for key in kept:
        small.root.write_json(key, {"resource": "diffusion.champion.digits", "once": "1 after None"})
    small.age(days=2)
    assert going(small) == set() and why(small, "events/1.json") == "needed by gates/digits"


def test_the_stage_deletes_only_when_told_to_and_writes_nothing_else(small, capsys):
    """Not even the files of a job, for which a full store has no room."""
    from flows.cli import main

    ended = small.job("shard-1", {})
    small.age(days=2)
    command = ["prune", "--older-than", "1d", "--store", small.uri]
    for _ in range(2):
        assert main(command) == 0
        assert small.root.exists(f"{ended}/result.json")
    assert main([*command, "--yes", "--json"]) == 0
    assert ended in capsys.readouterr().out and [entry.key for entry in small.root.list()] == []
    assert main([*command[:2], "soon", *command[3:]]) == 2
    assert capsys.readouterr().err.startswith("--older-than soon: it is not a time")
    assert main(["prune", "--store", f"{small.uri}/none"]) == 2 and "no folder" in capsys.readouterr().err


def test_what_ended_jobs_left_goes_and_what_others_hold_stays(small):
    ended, running = small.job("shard-1", {}), small.job("shard-2", {}, ended=False)
    turn, held = (small.root / f"leases/shard/digits/{number}" for number in (1, 2))
    claim(turn, {}).end()
    with claim(held, {}):
        small.age(days=2)
        assert going(small, Retention(3600)) == {ended, "leases/shard/digits/1"}
        prune.apply(small.uri, prune.plan(small.uri, Retention(3600)), Retention(3600))
        assert {entry.key.rpartition("/")[0] for entry in small.root.list()} == {running, "leases/shard/digits/2"}
    with claim(turn, {}) as again:
        assert again.number == 1


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
