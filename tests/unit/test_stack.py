"""Telling a process of the stack from another with the same id, with and without /proc and ps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_core.config import UserError
from flows.stack import processes

SYSTEMS = [
    pytest.param("/proc", marks=pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")),
    pytest.param("/nowhere", marks=pytest.mark.skipif(shutil.which("ps") is None, reason="no ps here")),
]


@pytest.mark.parametrize("proc", SYSTEMS)
def test_when_a_process_started(proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PROC", Path(proc))
    if proc == "/proc":
        monkeypatch.setenv("PATH", "")
    started = processes.started(os.getpid())
    assert started and processes.started(os.getpid()) == started
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert processes.started(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.started(child.pid) == "", "a zombie"
    child.communicate()
    assert processes.started(child.pid) == ""


def test_without_proc_and_ps_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PROC", Path("/nowhere"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="program ps"):
        processes.started(os.getpid())
