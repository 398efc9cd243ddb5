"""One at a time, over a store that offers nothing but create-if-absent.

A claim is a numbered file, `<n>.json`, created if absent: exactly one process can hold number n. Its holder shows that
it lives by counting in `<n>.beat.json`, and says how it ended in `<n>.end.json`. When the newest claim is dead, whoever
creates `<n+1>.json` holds the lease, and the former holder, should it wake up, sees that it lost it. No clocks are
compared between machines, nothing is ever deleted, and the files remain as the history of the attempts.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from diffusion_core.store.directory import Directory
from diffusion_core.store.patience import StoreUnavailable, patience

logger = logging.getLogger(__name__)

BEAT_S = 5.0
PATIENCE_S = 60.0
END_PATIENCE_S = 10.0
OK, FAILED, LOST = "ok", "failed", "lost"


@dataclass
class Lease:
    """A claim of this process. As a context manager it ends as `ok`, or as `failed` when an exception passes."""

    directory: Directory
    number: int
    beat_s: float = BEAT_S
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def still_mine(self) -> bool:
        """False once another process judged this one dead and claimed the next number."""
        return not self.directory.exists(f"{self.number + 1}.json")

    def end(self, outcome: str = OK) -> None:
        """Give the lease back and record how it ended; the first outcome stays.

        Where the store is away, others learn it from the silence: it must hide neither the work nor what ended it.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            with patience(END_PATIENCE_S):
                self.directory.create_json(f"{self.number}.end.json", {"outcome": outcome})
        except StoreUnavailable:
            logger.warning("The end of lease %s/%d is not recorded.", self.directory.uri, self.number, exc_info=True)

    def start_beating(self) -> None:
        self._thread = threading.Thread(target=self._beat, name=f"lease-{self.number}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self.beat_s):
            count += 1
            try:
                with patience(self.beat_s):
                    self.directory.write_json(f"{self.number}.beat.json", {"count": count})
            except Exception:  # a store that is away for a moment must not end the beating: others would take over
                logger.warning("The lease %s/%d could not be renewed.", self.directory.uri, self.number, exc_info=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(OK if kind is None else FAILED)


@dataclass
class Held:
    """Another process holds the lease. Poll it: its heart is judged by how long *this* object saw it stand still.

    Time in which the store gave this process no answer does not count: the holder could not write a beat then.
    """

    directory: Directory
    number: int
    owner: dict[str, Any]
    patience_s: float = PATIENCE_S
    clock: Callable[[], float] = time.monotonic
    _seen: int | None = None
    _changed_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._seen = _count(self.directory, self.number)
        self._changed_at = self.clock()

    def outcome(self) -> str | None:
        """None while the holder lives; `ok` or `failed` as it said itself; `lost` if it went without a word."""
        asked_at = self.clock()
        ended = _outcome(self.directory, self.number)
        if ended is not None:
            return ended
        if _process_is_gone(self.owner):
            return _outcome(self.directory, self.number) or LOST  # it may have ended properly just now
        count = _count(self.directory, self.number)
        self._changed_at += self.clock() - asked_at
        if count != self._seen:
            self._seen, self._changed_at = count, self.clock()
        return LOST if self.clock() - self._changed_at > self.patience_s else None

    def wait(self, poll_s: float = 1.0, on_poll: Callable[[], None] | None = None) -> str:
        """Wait until the holder ended or died, and return its outcome."""
        while (outcome := self.outcome()) is None:
            if on_poll is not None:
                on_poll()
            time.sleep(poll_s)
        return outcome


def claim(
    directory: Directory,
    owner: dict[str, Any],
    *,
    after: Held | None = None,
    beat_s: float = BEAT_S,
    patience_s: float = PATIENCE_S,
) -> Lease | Held:
    """Take the lease of this directory if it is free; never waits.

    Args:
        directory: where the claims are.
        owner: what to write into the claim about its holder, besides host and process, which are added.
        after: a holder that `outcome()` found `lost`, as its process cannot be seen from here: it counts as dead.
        beat_s: seconds between two signs of life.
        patience_s: seconds without one, as seen by an observer, after which the holder counts as dead.

    Returns:
        The `Lease`, or who has it. Use `acquire` to wait for it.
    """
    number = _newest(directory)
    while True:
        if number and not _is_dead(directory, number, after):
            return Held(directory, number, directory.read_json(f"{number}.json"), patience_s)
        number += 1
        token = uuid.uuid4().hex
        created = directory.create_json(f"{number}.json", {**owner, **_this_process(), "token": token})
        if created or _token(directory, number) == token:  # a retried request may be refused by its own first success
            lease = Lease(directory, number, beat_s)
            lease.start_beating()
            return lease


def acquire(
    directory: Directory,
    owner: dict[str, Any],
    *,
    poll_s: float = 1.0,
    on_wait: Callable[[Held], None] | None = None,
    beat_s: float = BEAT_S,
    patience_s: float = PATIENCE_S,
) -> Lease:
    """Wait until the lease of this directory is free, and take it. `on_wait` is called at each poll meanwhile."""
    got = claim(directory, owner, beat_s=beat_s, patience_s=patience_s)
    while isinstance(got, Held):
        held = got
        held.wait(poll_s, None if on_wait is None else lambda held=held: on_wait(held))  # type: ignore[misc]
        got = claim(directory, owner, after=held, beat_s=beat_s, patience_s=patience_s)
    return got


def _newest(directory: Directory) -> int:
    """The highest number that a listing shows. It may lag behind: creating decides."""
    numbers = [entry.key.removesuffix(".json") for entry in directory.list()]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _is_dead(directory: Directory, number: int, after: Held | None) -> bool:
    if _outcome(directory, number) is not None:
        return True
    if after is not None and after.number == number:
        return after.outcome() is not None
    return _process_is_gone(directory.read_json(f"{number}.json"))


def _token(directory: Directory, number: int) -> str | None:
    token = directory.read_json(f"{number}.json").get("token")
    return None if token is None else str(token)


def _outcome(directory: Directory, number: int) -> str | None:
    try:
        return str(directory.read_json(f"{number}.end.json")["outcome"])
    except FileNotFoundError:
        return None


def _count(directory: Directory, number: int) -> int | None:
    try:
        return int(directory.read_json(f"{number}.beat.json")["count"])
    except FileNotFoundError:
        return None


def _this_process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def _process_is_gone(owner: dict[str, Any]) -> bool:
    """True if the owner ran on this very machine (and in this container) and its process is no more."""
    if owner.get("started") is None or owner.get("host") != _host():
        return False
    return _started(int(owner["pid"])) != owner["started"]


def _host() -> str:
    """Names a set of process ids: host name, boot, and process namespace, as two containers may share the name."""
    boot = _text("/proc/sys/kernel/random/boot_id")
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {boot} {namespace}"


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if it is gone, or a zombie, or this system cannot tell."""
    text = _text(f"/proc/{pid}/stat")
    fields = text.rpartition(")")[2].split()
    return None if not fields or fields[0] in "ZX" else fields[19]


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
