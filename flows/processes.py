"""Processes of this machine: starting one in a session of its own, and ending it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusion_core.processes import group_lives, started

PATIENCE_S = 30.0
KILL_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Process:
    """One process of this machine, told from later ones with the same id by when it started."""

    pid: int
    started: str

    @classmethod
    def named(cls, pid: int) -> Process:
        """The process that has this id now; one that is gone is never alive."""
        return cls(pid, started(pid) or "")

    @property
    def alive(self) -> bool:
        return bool(self.started) and started(self.pid) == self.started


def this() -> Process:
    """The process that asks."""
    return Process.named(os.getpid())


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start a process in a session of its own, so that it outlives the terminal; its output is added to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    return Process.named(process.pid)


def end(process: Process, patience_s: float = PATIENCE_S) -> None:
    """SIGTERM and, for whom that does not end in time, SIGKILL."""
    _send_until_dead(process, os.kill, patience_s)


def end_group(leader: Process, patience_s: float = PATIENCE_S) -> None:
    """End a process with the group that it leads; members that outlive it are killed, and hold no port afterwards."""
    if not leader.alive and started(leader.pid):
        return  # the id belongs to somebody else by now, and so does the group
    _send_until_dead(leader, os.killpg, patience_s)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_PATIENCE_S
    while group_lives(leader.pid) and time.monotonic() < deadline:
        time.sleep(0.05)


def _send_until_dead(process: Process, send: Callable[[int, int], None], patience_s: float) -> None:
    for signum, seconds in ((signal.SIGTERM, patience_s), (signal.SIGKILL, KILL_PATIENCE_S)):
        if not process.alive:
            return
        with suppress(ProcessLookupError):
            send(process.pid, signum)
        deadline = time.monotonic() + seconds
        while process.alive and time.monotonic() < deadline:
            _reap(process.pid)
            time.sleep(0.1)


def _reap(pid: int) -> None:
    """Of a child of this very process, take the exit status: it would stay a zombie."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
