"""A look at what can go wrong, once: by the command that runs a flow, or else by the flow itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_checked: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def already_checked() -> Iterator[None]:
    """Flows that run inside the block do not look again."""
    before = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(before)


def check_unless_done(check: Callable[[], None]) -> None:
    """In a flow: look at what can go wrong, unless the command that runs it has done so."""
    if not _checked.get():
        check()
