"""How long a store that is away is waited for, and what is raised when it stayed away for longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PATIENCE_S = 180.0
EXIT_STORE_AWAY = 75  # EX_TEMPFAIL of sysexits.h
_chosen_s: ContextVar[float | None] = ContextVar("patience_s", default=None)


class StoreUnavailable(Exception):
    """The store was away for longer than the patience: not for the user to mend, and a later attempt may succeed.

    No `OSError`, which says that something is wrong with a file.
    """


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """In this thread and block, requests to a store that is away give up after so long and not after `PATIENCE_S`."""
    before = _chosen_s.set(seconds)
    try:
        yield
    finally:
        _chosen_s.reset(before)


def patience_s() -> float:
    """Seconds for which a request that fails for a passing reason is repeated here."""
    chosen = _chosen_s.get()
    return PATIENCE_S if chosen is None else chosen
