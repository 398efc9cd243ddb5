"""Processes by machine, number and start, so that a number which is used again is not taken for the one before."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What names this process for `is_gone`."""
    return named(os.getpid())


def named(pid: int) -> dict[str, Any]:
    """What names a process of this machine for `is_gone`, for as long as it lives."""
    return {"host": host(), "pid": pid, "started": _started(pid)}


def is_gone(owner: dict[str, Any]) -> bool:
    """True if the process ran on this very machine (and in this container) and is no more."""
    if owner.get("started") is None or owner.get("host") != host():
        return False
    return _started(int(owner["pid"])) != owner["started"]


def host() -> str:
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
