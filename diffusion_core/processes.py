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
    if _has_proc():
        fields = _stat(PROC / f"{pid}/stat")
        return None if not fields or _is_over(fields) else fields[19]
    state, _, start = _ps("-o", "stat=,lstart=", "-p", str(pid)).strip().partition(" ")
    return None if state.startswith("Z") else start.strip() or None


def group_lives(leader: int) -> bool:
    """True while a process of the group that `leader` leads, or led, runs; zombies hold nothing any more."""
    if _has_proc():
        living = [fields[2] for fields in map(_stat, PROC.glob("[0-9]*/stat")) if fields and not _is_over(fields)]
    else:
        shown = [line.split() for line in _ps("-eo", "stat=,pgid=").splitlines()]
        living = [group for state, group in shown if state[0] not in "ZX"]
    return str(leader) in living


def _is_over(fields: list[str]) -> bool:
    """What is shown as a zombie while a thread of it is left, as of one that was killed, has its ports still."""
    state, threads = fields[0], int(fields[17])
    return state in "ZX" and threads <= 1


def _has_proc() -> bool:
    """On Linux, where slim images have no ps."""
    return (PROC / "self/stat").exists()


def _stat(path: Path) -> list[str]:
    """State, parent, group and so on of a process, after its name; empty if it is gone."""
    return _text(path).rpartition(")")[2].split()


def _ps(*options: str) -> str:
    try:
        return subprocess.run(["ps", *options], capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise UserError("The program ps is needed to look after processes; install it (procps).") from None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
