"""Two triggers of one piece of work: the second waits, says for whom, and is told that it waited."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffusion_core.store.turns import one_at_a_time


def test_the_second_trigger_waits_for_the_first(store: str, caplog: pytest.LogCaptureFixture) -> None:
    inside, done = threading.Event(), []

    def first() -> None:
        with one_at_a_time(store, "shard", "x/1") as waited:
            assert not waited
            inside.set()
            while "waiting for it" not in caplog.text:
                time.sleep(0.01)
            done.append("the work")

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(first)
        assert inside.wait(10)
        with one_at_a_time(store, "shard", "x/2") as waited:
            assert not waited and not done, "other work need not wait"
        with one_at_a_time(store, "shard", "x/1") as waited:
            assert waited and done == ["the work"]
        other.result()
    with one_at_a_time(store, "shard", "x/1") as waited:
        assert not waited
