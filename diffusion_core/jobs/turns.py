"""One job at a time for one piece of work: a second trigger waits for the first, and finds the work done."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusion_core.lease import Held, acquire
from diffusion_core.storage import Directory

logger = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(store: str, stage: str, work: str) -> Iterator[bool]:
    """Be the only job inside the block, of all that name the same work; yields whether another one came first.

    Work is named by an id of its result. It saves doing it twice and no more: a holder that was silent for a minute is
    followed while it may still live, so what is written inside must be created if absent.
    """
    waited_for: list[int] = []

    def say(held: Held) -> None:
        if held.number not in waited_for:
            waited_for.append(held.number)
            who = f"process {held.owner.get('pid')} on {str(held.owner.get('host')).partition(' ')[0]}"
            logger.warning("another job is at the same work already (%s); waiting for it", who)

    with acquire(Directory(store) / f"leases/{stage}/{work}", {"kind": f"{stage} job"}, on_wait=say):
        yield bool(waited_for)
