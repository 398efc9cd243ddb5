"""Telling a process from another with the same id, with and without /proc and ps, and ending one with its group."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_core import processes as identity
from diffusion_core.config import UserError
from flows import processes
from flows.processes import Process
from tests.local_stack import wait_for

SYSTEMS = [
    pytest.param("/proc", marks=pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")),
    pytest.param("/nowhere", marks=pytest.mark.skipif(shutil.which("ps") is None, reason="no ps here")),
]


@pytest.mark.parametrize("proc", SYSTEMS)
def test_when_a_process_started(proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "PROC", Path(proc))
    if proc == "/proc":
        monkeypatch.setenv("PATH", "")
    started = identity.started(os.getpid())
    assert started and identity.started(os.getpid()) == started
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert identity.started(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identity.started(child.pid) is None, "a zombie"
    child.communicate()
    assert identity.started(child.pid) is None


@pytest.mark.parametrize("proc", SYSTEMS)
def test_whether_a_group_lives_on_without_its_leader(proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "PROC", Path(proc))
    member = "import time; print('here', flush=True); time.sleep(60)"
    lead = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {member!r}]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", lead], stdout=subprocess.PIPE, start_new_session=True) as leader:
        try:
            assert leader.stdout and leader.stdout.readline() == b"here\n"
            leader.kill()
            leader.wait()
            assert identity.started(leader.pid) is None and identity.group_lives(leader.pid)
        finally:
            os.killpg(leader.pid, signal.SIGKILL)
        wait_for(lambda: not identity.group_lives(leader.pid), "the end of the group", 10)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel for it")
def test_a_process_whose_first_thread_ended_lives_and_is_ended(tmp_path: Path) -> None:
    """The kernel shows it as a zombie, and so it does for a moment with every killed process of several threads."""
    lead = """
import ctypes, socket, threading, time
taken = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=time.sleep, args=(60,)).start()
print(taken.getsockname()[1], flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    leader = processes.start([sys.executable, "-c", lead], {}, tmp_path / "log")
    stat = Path(f"/proc/{leader.pid}/stat")
    wait_for(lambda: stat.read_text().rpartition(") ")[2].startswith("Z"), "the end of the first thread", 20)
    assert leader.alive and identity.group_lives(leader.pid)
    address = ("127.0.0.1", int((tmp_path / "log").read_text()))
    socket.create_connection(address).close()
    processes.end_group(leader, patience_s=5)
    assert not leader.alive and not identity.group_lives(leader.pid)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_without_proc_and_ps_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "PROC", Path("/nowhere"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="program ps"):
        identity.started(os.getpid())


def test_a_group_ends_with_the_members_that_do_not_want_to(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    lead = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stubborn!r}])"
    log = tmp_path / "log"
    leader = processes.start([sys.executable, "-c", lead], {}, log)
    while "deaf" not in log.read_text():
        time.sleep(0.05)
    assert leader.alive and os.getsid(leader.pid) == leader.pid

    processes.end_group(Process(leader.pid, "another start"))
    assert leader.alive, "the group of somebody who got the same id"
    processes.end_group(leader, patience_s=5)
    assert not leader.alive and not identity.group_lives(leader.pid), "a member outlived its group"
