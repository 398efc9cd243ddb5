"""The local stack as a user has it: the command in a process of its own, Prefect's HTTP API, and what runs where."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def diffusion(*arguments: str) -> Any:
    """Run the command and return the JSON that it prints."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
    return answer


def alive(pid: int) -> bool:
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(shown.strip()) and not shown.startswith("Z")


def processes_about(word: str) -> list[int]:
    """Processes of this machine whose command line has `word` in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and folder.name != str(os.getpid()):
            try:
                if word in (folder / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(folder.name))
            except OSError:  # it ended while we looked
                continue
    return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Api:
    """Prefect's HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/api/{path}", data, headers, method=method)
        for attempt in Retrying(retry=retry_if_exception(_is_busy), stop=stop_after_delay(60), wait=wait_fixed(1)):
            with attempt, urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "null")

    def deployments(self) -> dict[str, Any]:
        flows = {flow["id"]: flow["name"] for flow in self("flows/filter", {})}
        return {f"{flows[item['flow_id']]}/{item['name']}": item for item in self("deployments/filter", {})}

    def start(self, deployment: str, parameters: dict[str, Any], tags: tuple[str, ...] = ()) -> str:
        """Ask for a run, as a person does in the UI; its id."""
        body = {"parameters": parameters, "tags": tags, "state": {"type": "SCHEDULED"}}
        return str(self(f"deployments/{self.deployments()[deployment]['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> Any:
        return self(f"flow_runs/{run_id}")

    def wait_for(self, run_id: str, *states: str, seconds: float = 90) -> Any:
        return wait_for(lambda: self.run(run_id)["state"]["type"] in states, f"{states}", seconds) and self.run(run_id)


def _is_busy(error: BaseException) -> bool:
    """Prefect answers late, or 503, while its database is locked, and its own clients ask again then."""
    return isinstance(error, TimeoutError) or (isinstance(error, urllib.error.HTTPError) and error.code == 503)


class LocalStack:
    """The stack of a store, on ports of its own."""

    def __init__(self, store: str, *options: str) -> None:
        self.store = store
        self._options = options
        self._ports: tuple[str, ...] = ()  # drawn late, before another program takes them
        self.services: dict[str, Any] = {}

    def up(self) -> dict[str, Any]:
        """Bring it up, with what of it is down; the services by name."""
        self._ports = self._ports or ("--prefect-port", free_port(), "--mlflow-port", free_port())
        started = diffusion("stack", "up", "--store", self.store, *self._ports, *self._options)
        self.services = {service["name"]: service for service in started}
        return self.services

    def down(self) -> list[dict[str, Any]]:
        ended: list[dict[str, Any]] = diffusion("stack", "down", "--store", self.store)
        return ended

    @property
    def api(self) -> Api:
        return Api(self.services["prefect"]["url"])
