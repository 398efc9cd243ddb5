"""What a job took: measured once, in the job's own program, and handed back with its result. Never part of an id."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from diffusion_core import progress, traffic
from diffusion_core.jobs.request import Account
from diffusion_core.progress import ProgressEvent
from diffusion_core.traffic import Traffic

T = TypeVar("T")


class Usage(NamedTuple):
    """What some work took in the process that did it: CPU seconds of all its threads, and traffic with the store."""

    cpu_seconds: float = 0.0
    traffic: Traffic = Traffic()

    def __add__(self, other: Usage) -> Usage:  # type: ignore[override]
        return Usage(self.cpu_seconds + other.cpu_seconds, self.traffic + other.traffic)


def measured(work: Callable[[], T]) -> tuple[T, Usage]:
    """The result of a call in this process, and what it took. One call at a time: threads are not told apart."""
    cpu, before = time.process_time(), traffic.so_far()
    answer = work()
    return answer, Usage(time.process_time() - cpu, traffic.so_far().since(before))


class Bookkeeper:
    """The account of this process's job."""

    def __init__(self) -> None:
        self._began, self._cpu, self._traffic = time.monotonic(), _cpu_seconds(), traffic.so_far()
        self._workers, self._gpu_seconds, self._aside = Usage(), 0.0, 0.0
        self._images: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, usage: Usage) -> None:
        """What a worker took, in a process that is none of this one's."""
        with self._lock:
            self._workers += usage

    @contextmanager
    def reserved_gpus(self, gpus: float) -> Iterator[None]:
        """GPUs are held for this job inside the block, used or not."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._gpu_seconds += gpus * (time.monotonic() - began)

    @contextmanager
    def workers_ending(self) -> Iterator[None]:
        """Ray's processes end inside the block: what is learned of them here, the workers have told already."""
        before = _child_seconds()
        try:
            yield
        finally:
            self._aside += _child_seconds() - before

    def count_images(self, event: ProgressEvent, new: float) -> None:
        if event.unit == "images":
            with self._lock:
                self._images[event.stage] = self._images.get(event.stage, 0) + new

    def account(self) -> Account:
        taken = traffic.so_far().since(self._traffic) + self._workers.traffic
        return Account(
            seconds=time.monotonic() - self._began,
            cpu_seconds=_cpu_seconds() - self._cpu - self._aside + self._workers.cpu_seconds,
            gpu_seconds=self._gpu_seconds,
            images=round(max(self._images.values(), default=0)),  # several passes over the same images are one work
            bytes_written=taken.bytes_written,
            s3_requests=taken.s3_requests,
        )


def _cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + _child_seconds()


def _child_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


_keeper = Bookkeeper()


def keeper() -> Bookkeeper:
    return _keeper


def open_account() -> Bookkeeper:
    """Begin the account of the job that this process runs."""
    global _keeper
    _keeper = Bookkeeper()
    progress.listeners.append(_keeper.count_images)
    return _keeper
