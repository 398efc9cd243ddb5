"""`running.json`: that somebody waits for a job, who it is, and where the job runs.

Whoever waits counts on in it. A job whose waiter is gone, by its process number on this machine or by its silence on
another, ends itself as if it had been told to; a job that cannot is found and ended by `orphans.py`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from diffusion_core.config import UserError
from diffusion_core.processes import is_gone
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import StoreUnavailable, patience

RUNNING = layout.RUNNING
SILENCE_S = 75.0
LOOK_S = 5.0

logger = logging.getLogger(__name__)


class Running(BaseModel):
    """What stands in `running.json`.

    waiter: the process that waits, as `processes.is_gone` wants it; process: that of the job, on the waiter's machine;
    api: the Ray Jobs API that runs the job, under the job's id; beats: grows while somebody waits.
    """

    waiter: dict[str, Any] = {}
    process: dict[str, Any] | None = None
    api: str | None = None
    beats: int = 0


def read(place: Directory) -> Running | None:
    """None if nobody waits for the job whose files are in `place`."""
    try:
        return Running.model_validate(place.read_json(RUNNING))
    except FileNotFoundError:
        return None


def end_without_waiter(place: Directory) -> None:
    """End this process with SIGTERM once nobody waits for it any more; a job that nobody waited for is left alone."""
    threading.Thread(target=_watch, args=(place, _terminate), name="waiter", daemon=True).start()


def _terminate() -> None:
    logger.warning("Whoever waited for this job is gone; it ends, and the same request continues the work.")
    os.kill(os.getpid(), signal.SIGTERM)


def _watch(place: Directory, end: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
    beats, heard_at = -1, clock()
    while True:
        asked_at = clock()
        try:
            with patience(LOOK_S):
                running = read(place)
        except (UserError, OSError, StoreUnavailable, ValueError):
            heard_at += clock() - asked_at + LOOK_S  # where the store is away, the waiter cannot count on either
            time.sleep(LOOK_S)
            continue
        if running is None:
            if beats >= 0:
                end()
            return
        if running.beats != beats:
            beats, heard_at = running.beats, clock()
        if is_gone(running.waiter) or clock() - heard_at > SILENCE_S:
            end()
            return
        time.sleep(LOOK_S)
