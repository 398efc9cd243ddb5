"""What can go wrong is looked at once before a flow's first stage: by the command that runs it, or by the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CHECKED: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def checked_before() -> Iterator[None]:
    """A flow that is called inside has been checked by its caller."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def check_unless_done(check: Callable[[], None]) -> None:
    """In a flow: raises what `check` raises, unless the caller has done it."""
    if not _CHECKED.get():
        check()
