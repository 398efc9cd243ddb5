"""A job as a subprocess of this machine. Stopping it, or the end of whoever waits for it, ends its whole family."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from diffusion_core.jobs.transport import GRACE_S
from diffusion_core.processes import named


class LocalJob:
    """A job as a subprocess, leader of its own session, so that a Ctrl-C of the terminal reaches it through us only."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.process: dict[str, Any] | None = named(self.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def lines(self) -> Iterator[str]:
        for line in self._output():
            yield line.decode(errors="replace").rstrip("\r\n")

    def exit_status(self) -> int:
        return self._process.wait()

    def stop(self, signum: int) -> None:
        """Ask the job to end its workers in good order; after the grace, or at a second Ctrl-C, kill its group."""
        try:
            with suppress(ProcessLookupError):
                self._process.send_signal(signum)
            with suppress(subprocess.TimeoutExpired):
                self._drain(GRACE_S)
        finally:
            self._kill_group()
            self._process.wait()

    def _drain(self, timeout_s: float) -> None:
        """Wait for the end while reading on: a job that fills an unread pipe would never end."""
        reader = threading.Thread(target=lambda: deque(self._output(), maxlen=0), daemon=True)
        reader.start()
        self._process.wait(timeout_s)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # the leader's pid names the group while a member lives
            os.killpg(self._process.pid, signal.SIGKILL)

    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout


def die_with_parent() -> None:
    """In the child, before exec: have the kernel send SIGTERM when the process that waits for it is killed."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
