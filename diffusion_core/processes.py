"""Processes by machine, number and start, so that a number which is used again is not taken for the one before."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from diffusion_core.config import UserError

PROC = Path("/proc")


def this_process() -> dict[str, Any]:
    """What names this process for `is_gone`."""
    return named(os.getpid())


def named(pid: int) -> dict[str, Any]:
    """What names a process of this machine for `is_gone`, for as long as it lives."""
    return {"host": host(), "pid": pid, "started": started(pid)}


def is_gone(owner: dict[str, Any]) -> bool:
    """True if the process ran on this very machine (and in this container) and is no more."""
    if owner.get("started") is None or owner.get("host") != host():
        return False
    return started(int(owner["pid"])) != owner["started"]


def host() -> str:
    """Names a set of process ids: host name, boot, and process namespace, as two containers may share the name."""
    boot = _text(PROC / "sys/kernel/random/boot_id")
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {boot} {namespace}"


def started(pid: int) -> str | None:
    """When a process started, as text that differs between two of the same number; None if it is gone, or a zombie."""
    if (PROC / "self/stat").exists():  # Linux, where slim images have no ps
        fields = _text(PROC / f"{pid}/stat").rpartition(")")[2].split()
        return None if not fields or fields[0] in "ZX" else fields[19]
    try:
        shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("The program ps is needed to look after processes; install it (procps).") from None
    state, _, start = shown.stdout.strip().partition(" ")
    return None if state.startswith("Z") else start.strip() or None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
