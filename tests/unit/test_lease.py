"""The lease: one holder at a time, dead holders are followed, live ones are not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from diffusion_core.store import Directory
from diffusion_core.store.lease import Held, Lease, acquire, claim, seems_held

ELSEWHERE = {"host": "another machine", "pid": 1, "started": "1"}


@pytest.fixture
def place(tmp_path):
    return Directory(tmp_path / "attempts")


def test_first_claim_wins_and_second_sees_the_holder(place):
    lease = claim(place, {"job": "a"})
    other = claim(place, {"job": "b"})
    assert isinstance(lease, Lease) and lease.number == 1
    assert isinstance(other, Held) and other.number == 1 and other.owner["job"] == "a"
    assert other.outcome() is None
    lease.end()
    assert other.outcome() == "ok"


@pytest.mark.parametrize("outcome", ["ok", "failed"])
def test_an_ended_claim_is_followed_by_the_next_number(place, outcome):
    first = claim(place, {})
    first.end(outcome)
    second = claim(place, {})
    assert isinstance(second, Lease) and second.number == 2
    assert not first.still_mine() and second.still_mine()
    second.end()


def test_context_manager_records_failure(place):
    with pytest.raises(ZeroDivisionError), claim(place, {}):
        1 / 0  # noqa: B018
    assert place.read_json("1.end.json") == {"outcome": "failed"}


def test_the_first_outcome_stays(place):
    lease = claim(place, {})
    lease.end("failed")
    lease.end("ok")
    assert place.read_json("1.end.json") == {"outcome": "failed"}


def test_a_killed_process_on_this_machine_is_followed_at_once(place):
    code = (
        "import sys, time; from diffusion_core.store.lease import claim; from diffusion_core.store import Directory\n"
        "claim(Directory(sys.argv[1]), {}); print('claimed', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, place.uri], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
    held = claim(place, {})
    assert isinstance(held, Held) and held.outcome() is None
    holder.kill()
    holder.wait()
    assert held.outcome() == "lost"
    lease = claim(place, {})
    assert isinstance(lease, Lease) and lease.number == 2
    lease.end()


def test_a_reused_process_id_does_not_look_alive(place):
    lease = claim(place, {})
    lease.end()
    place.create_json("2.json", {**place.read_json("1.json"), "started": "1"})
    lease = claim(place, {})
    assert isinstance(lease, Lease)
    lease.end()


def test_a_remote_holder_is_dead_when_its_heart_stands_still_for_the_observer(place):
    place.create_json("1.json", ELSEWHERE)
    place.write_json("1.beat.json", {"count": 7})
    now = [0.0]
    held = Held(place, 1, ELSEWHERE, patience_s=60, clock=lambda: now[0])
    now[0] = 59.0
    assert held.outcome() is None
    place.write_json("1.beat.json", {"count": 8})
    now[0] = 118.0
    assert held.outcome() is None
    now[0] = 200.0
    assert held.outcome() == "lost"
    assert isinstance(claim(place, {}), Held), "a newcomer has not watched long enough to judge"
    lease = claim(place, {}, after=held)
    assert isinstance(lease, Lease) and lease.number == 2
    lease.end()


def test_a_remote_holder_that_beats_again_is_not_followed(place):
    place.create_json("1.json", ELSEWHERE)
    now = [0.0]
    held = Held(place, 1, ELSEWHERE, patience_s=10, clock=lambda: now[0])
    now[0] = 11.0
    place.write_json("1.beat.json", {"count": 1})
    assert isinstance(claim(place, {}, after=held), Held)


def test_the_holder_beats(place):
    lease = claim(place, {}, beat_s=0.01)
    held = claim(place, {})
    deadline = time.monotonic() + 5
    while not place.exists("1.beat.json") and time.monotonic() < deadline:
        time.sleep(0.01)
    first = place.read_json("1.beat.json")["count"]
    time.sleep(0.1)
    assert place.read_json("1.beat.json")["count"] > first
    assert held.outcome() is None
    lease.end()


def test_a_stale_listing_does_not_make_two_holders(place, monkeypatch):
    """Object stores may list late: the number that create-if-absent refuses is looked at, not skipped."""
    first = claim(place, {})
    first.end()
    second = claim(place, {})
    monkeypatch.setattr("diffusion_core.store.lease._newest", lambda directory: 1)
    held = claim(place, {})
    assert isinstance(held, Held) and held.number == 2
    second.end()


def test_of_many_claims_at_once_one_wins(place):
    lone = claim(place, {})
    lone.end()
    barrier, got = threading.Barrier(16), []

    def race():
        barrier.wait()
        got.append(claim(place, {}))

    threads = [threading.Thread(target=race) for _ in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    leases = [one for one in got if isinstance(one, Lease)]
    assert len(leases) == 1 and all(one.number == 2 for one in got)
    leases[0].end()


def test_a_retried_request_recognises_its_own_claim(place, monkeypatch):
    """A reply that was lost on the way makes the retry find the file there: it is still ours."""
    create = Directory.create_json
    monkeypatch.setattr(Directory, "create_json", lambda self, key, obj: create(self, key, obj) and False)
    lease = claim(place, {})
    assert isinstance(lease, Lease) and lease.number == 1
    lease.end()


def test_acquire_takes_turns(place):
    turns, inside = [], threading.Lock()

    def work(name):
        with acquire(place, {"name": name}, poll_s=0.01) as lease:
            assert inside.acquire(blocking=False), "two holders at once"
            turns.append(lease.number)
            time.sleep(0.02)
            inside.release()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert turns == [1, 2, 3, 4, 5]


def test_claims_are_readable_json(place):
    claim(place, {"job": "x"}).end()
    owner = json.loads(place.read("1.json"))
    assert owner["job"] == "x" and owner["pid"] > 0 and owner["host"]


def test_who_does_not_listen_judges_by_the_process_if_it_is_here_and_else_by_the_last_sign(place):
    assert not seems_held(place, 3600)
    with claim(place, {}):
        assert seems_held(place, 0)
    assert not seems_held(place, 3600)
    place.write_json("2.json", ELSEWHERE)
    assert seems_held(place, 3600) and not seems_held(place, 0)
    place.write_json("2.end.json", {"outcome": "ok"})
    assert not seems_held(place, 3600)
    place.write_json("3.json", {**ELSEWHERE, "host": place.read_json("1.json")["host"]})
    assert not seems_held(place, 3600), "that process is gone"
