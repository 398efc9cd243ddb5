"""What a job took is counted where it happens, and is no part of what its result says about the work."""

from __future__ import annotations

import hashlib
import time

import pytest

from diffusion_core import progress, traffic
from diffusion_core.jobs import account
from diffusion_core.jobs.account import Usage, measured
from diffusion_core.jobs.cluster import metrics
from diffusion_core.progress import Progress
from diffusion_core.stages.shard import ShardResult
from diffusion_core.store import Directory
from diffusion_core.traffic import Traffic


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> account.Bookkeeper:
    monkeypatch.setattr(progress, "listeners", [])
    return account.open_account()


def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        hashlib.sha256(b"0" * 100_000).digest()


def test_an_account_adds_the_workers_to_the_program(keeper: account.Bookkeeper, store: str) -> None:
    Directory(store).write("a", b"12345")
    assert Directory(store).create("b", b"123")
    burn(0.2)
    keeper.add(Usage(10.0, Traffic(100, 7)))
    with keeper.reserved_gpus(2):
        time.sleep(0.05)
    for stage in ("spool", "shard"):  # two passes over the same images
        with Progress(stage, 10, initial=4, write=lambda line: None) as shown:
            shown.advance(3)
            shown.advance(3)
    with Progress("hash", 100, "files", write=lambda line: None) as shown:
        shown.advance(100)
    found = keeper.account()
    assert 10.2 <= found.cpu_seconds < 12 and 0.1 <= found.gpu_seconds < 1
    assert (found.images, found.bytes_written, found.s3_requests) == (6, 108, 7)


def test_what_a_call_takes(store: str) -> None:
    answer, usage = measured(lambda: (burn(0.1), Directory(store).write("a", b"12345"), "done")[-1])
    assert answer == "done" and 0.1 <= usage.cpu_seconds < 1 and usage.traffic == Traffic(5, 0)


def test_every_request_to_s3_counts(s3_store: str) -> None:
    before, place = traffic.so_far(), Directory(s3_store)
    place.write("a", b"12345")
    assert place.read("a") == b"12345" and not place.exists("b")
    assert traffic.so_far().since(before) == Traffic(5, 3)


def test_results_of_before_are_read() -> None:
    old = {"seconds": 1, "reused": True, "uri": "u", "version": "v", "splits": {}, "rejected": 0, "shards": 1}
    assert ShardResult.model_validate(old).account is None


def test_without_ray_figures_go_nowhere() -> None:
    metrics.count(metrics.Counter.images, 5)
    metrics.show(metrics.Gauge.queue_length, 5)
