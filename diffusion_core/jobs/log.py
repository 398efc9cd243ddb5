"""The log of a job in the store, while the job runs and after it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import StoreUnavailable, patience

LOG, RUNNING = layout.LOG, layout.RUNNING
LINES_KEPT = 5_000
EVERY_S = 10.0

logger = logging.getLogger(__name__)


class KeptLog:
    """The last lines of a job's output. A thread keeps them in the store, so that they outlive whoever waits.

    As a context manager it writes `log.txt` every few seconds and at the end; until then `running.json` lies beside it.
    """

    def __init__(self, place: Directory) -> None:
        self._place = place
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._lock, self._ended, self._changed = threading.Lock(), threading.Event(), True
        self._thread = threading.Thread(target=self._keep, name="job-log", daemon=True)

    def append(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
            self._changed = True

    def lines(self) -> list[str]:
        with self._lock:
            return list(self._lines)

    def __enter__(self) -> KeptLog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        self._attempt(lambda: self._place.write_json(RUNNING, {}))
        while not self._ended.wait(EVERY_S):
            self._attempt(self._write)
        self._attempt(self._write)
        self._attempt(lambda: self._place.delete(RUNNING))

    def _write(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, False
            text = "\n".join([*self._lines, ""])
        if changed:
            self._place.write(LOG, text.encode())

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            with patience(EVERY_S):
                write()
        except (UserError, OSError, StoreUnavailable) as error:  # only a convenience: it must not break the job
            self._changed = True
            logger.warning("The log of the job is not in the store: %s", error)
