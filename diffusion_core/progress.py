"""How a job tells the outside how far it is: one line a second on its standard output.

A line is `@progress ` followed by a JSON object, so that a terminal, a log file and Prefect can all follow a job that
runs somewhere else: whoever reads the output turns a line into a `ProgressEvent` with `parse_progress`.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType

MARK = "@progress "
listeners: list[Callable[[ProgressEvent, float], None]] = []
"""Called with each event that this process prints, and with the units that are new since the last one."""


@dataclass(frozen=True)
class ProgressEvent:
    """How far one stage is. `rate` is in units a second, `seconds_left` is None where nobody can tell."""

    stage: str
    done: float
    total: float | None = None
    unit: str = "images"
    rate: float | None = None
    seconds_left: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The event as one line of output, without its newline."""
        return MARK + json.dumps(asdict(self), separators=(",", ":"))

    def sentence(self) -> str:
        """The event for people: `train: 12,800 of 64,000 images (20 %), 512 images/s, 1:40 left, loss 0.0813`."""
        parts = [f"{_count(self.done)} {self.unit}"]
        if self.total:
            share = math.floor(100 * self.done / self.total)
            parts = [f"{_count(self.done)} of {_count(self.total)} {self.unit} ({share} %)"]
        if self.rate:
            parts.append(f"{_count(self.rate)} {self.unit}/s")
        if self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        parts.extend(f"{name} {value:.4g}" for name, value in self.figures.items())
        return f"{self.stage}: {', '.join(parts)}"


class Progress:
    """Counts the work of one stage and prints a progress line at most once a second, and always one at the end.

    `rate` is that of the last half minute, so that a slow start (a cluster, a compiler) does not spoil the estimate.
    `total` may be None (unknown) and may be given later by assigning it. Safe to use from several threads.

    Args:
        initial: units that were done before; None if the first `update` will tell. They do not count for the rate.
    """

    def __init__(
        self,
        stage: str,
        total: float | None = None,
        unit: str = "images",
        *,
        initial: float | None = 0,
        interval_s: float = 1.0,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self._done, self._figures = initial or 0.0, dict[str, float]()
        self._interval_s, self._write, self._clock = interval_s, write or _print_line, clock
        self._lock = threading.Lock()
        self._marks = [] if initial is None else [(clock(), initial)]
        self._told = initial or 0.0
        self._printed_at = -math.inf

    def advance(self, n: float = 1, **figures: float) -> None:
        """`n` more units are done."""
        with self._lock:
            self._set(self._done + n, figures)

    def update(self, done: float, **figures: float) -> None:
        """`done` units are done in all."""
        with self._lock:
            self._set(done, figures)

    def close(self) -> None:
        """Print the last line."""
        with self._lock:
            self._emit(self._clock())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _set(self, done: float, figures: dict[str, float]) -> None:
        now = self._clock()
        if not self._marks or done < self._done:  # work that is done again begins anew
            self._marks, self._told = [(now, done)], done
        self._done = done
        self._figures.update({name: float(value) for name, value in figures.items()})
        if now - self._printed_at >= self._interval_s:
            self._emit(now)

    def _emit(self, now: float) -> None:
        self._marks = [mark for mark in self._marks if now - mark[0] <= 30] or self._marks[-1:]
        then, done_then = self._marks[0] if self._marks else (now, self._done)
        rate = (self._done - done_then) / (now - then) if now > then else None
        left = None
        if rate and self.total is not None:
            left = max(0.0, (self.total - self._done) / rate)
        figures = {name: value for name, value in self._figures.items() if math.isfinite(value)}
        event = ProgressEvent(self.stage, self._done, self.total, self.unit, rate, left, figures)
        self._write(event.line())
        for listener in listeners:
            listener(event, self._done - self._told)
        self._told = self._done
        self._marks.append((now, self._done))
        self._printed_at = now


def parse_progress(line: str) -> ProgressEvent | None:
    """The event that a line of output holds; None for every other line, broken ones included.

    The mark may stand anywhere in the line: Ray and loggers put their prefixes before it.
    """
    at = line.find(MARK)
    if at < 0:
        return None
    try:
        fields, _ = json.JSONDecoder().raw_decode(line[at + len(MARK) :].lstrip())
        event = ProgressEvent(**fields)
    except (json.JSONDecodeError, TypeError):
        return None
    numbers = (event.done, event.total or 0, event.rate or 0, event.seconds_left or 0)
    valid = isinstance(event.stage, str) and all(isinstance(number, int | float) for number in numbers)
    return event if valid and isinstance(event.figures, dict) else None


def clock(seconds: float) -> str:
    """Seconds as people say them: `0:07`, `12:30`, `3:05:00`."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 or float(number).is_integer() else f"{number:.3g}"


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
