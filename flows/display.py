"""Progress for the person at the terminal: bars on a terminal, plain lines at growing intervals everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TextIO

from diffusion_core.progress import ProgressEvent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Display(Protocol):
    """Where a person sees what a flow does."""

    def progress(self, event: ProgressEvent) -> None:
        """How far a stage is."""

    def say(self, text: str) -> None:
        """One line of news."""


class Silent:
    """For flows that Prefect runs: its own log shows everything."""

    def progress(self, event: ProgressEvent) -> None:
        return

    def say(self, text: str) -> None:
        return


class Pace:
    """Lets an event of each stage through at first, after 5, 10, 20, … seconds, and then every `longest_s`."""

    def __init__(self, longest_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._next: dict[str, tuple[float, float]] = {}

    def due(self, event: ProgressEvent) -> bool:
        now = self._clock()
        at, wait = self._next.get(event.stage, (now, 2.5))
        finished = event.total is not None and event.done >= event.total
        if now < at and not finished:
            return False
        if finished and at == float("inf"):
            return False
        self._next[event.stage] = (
            (float("inf"), wait) if finished else (now + wait * 2, min(wait * 2, self._longest_s / 2))
        )
        return True


class Lines:
    """Plain text, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._pace = stream, Pace()

    def progress(self, event: ProgressEvent) -> None:
        if self._pace.due(event):
            self.say(f"  {event.sentence()}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Terminal:
    """A bar for each stage, with its rate, its figures and the time left."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def progress(self, event: ProgressEvent) -> None:
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, news="")
        news = event.sentence().removeprefix(f"{event.stage}: ")
        self._bars.update(self._tasks[event.stage], total=event.total, completed=event.done, news=news)

    def say(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, markup=False)


_current: ContextVar[Display | None] = ContextVar("display", default=None)


def current_display() -> Display:
    """The display of whoever started this flow."""
    return _current.get() or Silent()


@contextmanager
def shown(stream: TextIO | None = None) -> Iterator[Display]:
    """Show what happens inside the block on standard error, so that standard output holds results alone."""
    stream = stream or sys.stderr
    if not stream.isatty():
        with _as_current(Lines(stream)) as display:
            yield display
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, console=Console(file=stream)) as bars, _as_current(Terminal(bars)) as display:
        yield display


@contextmanager
def _as_current(display: Display) -> Iterator[Display]:
    token = _current.set(display)
    try:
        yield display
    finally:
        _current.reset(token)
