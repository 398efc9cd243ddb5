"""A Ray that a job starts for itself cannot be reached from another machine, and one that is gone is told at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from diffusion_core.config import UserError
from diffusion_core.jobs.cluster import session
from tests.local_stack import free_port

WORK = """
import os
from pathlib import Path
from diffusion_core.jobs.cluster.session import ray_session


def descendants(pid):
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def listening():
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                yield fields[9], fields[1].rpartition(":")[0]


with ray_session():
    import ray

    @ray.remote
    def work():
        return 1

    assert ray.get(work.remote()) == 1
    sockets = set()
    for pid in descendants(os.getpid()):
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(descriptor))
            except FileNotFoundError:
                continue
    print("addresses:", *sorted({address for inode, address in listening() if f"socket:[{inode}]" in sockets}))
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_local_ray_listens_on_loopback_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ENABLE")}
    command = [sys.executable, "-c", WORK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("addresses:"))
    found = set(line.split()[1:])
    assert found and found <= LOOPBACK, found


def test_a_cluster_that_is_gone_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"{address}, cannot be reached: nothing answers there\. If the cluster"):
        session._start()
    assert time.monotonic() - began < 30, "Ray tried for itself"
