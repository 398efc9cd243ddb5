"""One job at a time for one piece of work: a second trigger waits for the first, and finds the work done."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusion_core.store import layout
from diffusion_core.store.directory import Directory
from diffusion_core.store.lease import Held, acquire

logger = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(store: str, stage: str, work: str) -> Iterator[bool]:
    """Be the only job inside the block, of all that name the same work; yields whether another one came first.

    Work is named by an id of its result. It saves doing it twice and no more: a holder that was silent for a minute is
    followed while it may still live, so what is written inside must be created if absent.
    """
    waiting = Waiting("another job is at the same work already")
    with acquire(Directory(store) / layout.lease(stage, work), {"kind": f"{stage} job"}, on_wait=waiting):
        yield bool(waiting.holders)


class Waiting:
    """What a job that waits for a lease tells: why, and for whom, once for each holder."""

    def __init__(self, why: str) -> None:
        self._why = why
        self.holders: set[int] = set()

    def __call__(self, held: Held) -> None:
        if held.number not in self.holders:
            self.holders.add(held.number)
            who = f"process {held.owner.get('pid')} on {str(held.owner.get('host')).partition(' ')[0]}"
            logger.warning("%s (%s); waiting for it", self._why, who)
