"""A local stack that lives on: a Prefect server, an MLflow server, and a process that serves the deployments.

All of them listen on loopback only. What runs is written down in `<store>/stack/<service>.json` (for a store on S3, in
the user's cache folder), and each is ended by its process id, after a look at whether that is still the same process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout

HOST = "127.0.0.1"
PROC = Path("/proc")
START_TIMEOUT_S, STOP_TIMEOUT_S = 180.0, 30.0
SERVICES = ("prefect", "mlflow", "deployments")
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@dataclass(frozen=True)
class Service:
    """One process of the stack."""

    name: str
    pid: int
    started: str
    url: str | None
    log: str

    @property
    def alive(self) -> bool:
        return bool(self.started) and _started(self.pid) == self.started


def up(store: str, prefect_port: int, mlflow_port: int) -> list[Service]:
    """Start what does not run yet, wait until the servers answer, and return all services."""
    prefect = _ensure(
        store, "prefect", prefect_port, _prefect_command(prefect_port), _prefect_environment(store, prefect_port)
    )
    mlflow = _ensure(store, "mlflow", mlflow_port, _mlflow_command(store, mlflow_port), {})
    api = f"{prefect.url}/api"
    _wait_for(f"{api}/health", prefect)
    _wait_for(f"{mlflow.url}/health", mlflow)
    environment = {"PREFECT_API_URL": api}
    if not Directory(store).is_local and mlflow.url:
        environment["MLFLOW_TRACKING_URI"] = mlflow.url
    command = [sys.executable, "-m", "flows.deploy", "--store", Directory(store).uri]
    return [prefect, mlflow, _ensure(store, "deployments", None, command, environment)]


def down(store: str) -> list[Service]:
    """End every service that runs, the last started first, and return those that were ended."""
    running = [service for service in reversed(status(store)) if service.alive]
    for service in running:
        _end(service)
    for name in SERVICES:
        (folder(store) / f"{name}.json").unlink(missing_ok=True)
    return running


def status(store: str) -> list[Service]:
    """The services that were started for this store, alive or not."""
    found = []
    for name in SERVICES:
        with suppress(OSError, ValueError, TypeError):
            found.append(Service(**json.loads((folder(store) / f"{name}.json").read_text())))
    return found


def adopt(store: str) -> None:
    """Use the servers of this store's stack, if it runs, where the environment names no others."""
    urls = {service.name: service.url for service in status(store) if service.alive}
    if urls.get("prefect"):
        os.environ.setdefault("PREFECT_API_URL", f"{urls['prefect']}/api")
    if urls.get("mlflow") and not Directory(store).is_local:  # of a local store everyone opens the database itself
        os.environ.setdefault("MLFLOW_TRACKING_URI", str(urls["mlflow"]))


def folder(store: str) -> Path:
    """Where the stack of a store keeps its process ids, logs and databases."""
    place = Directory(store)
    if place.is_local:
        return place.local_path / layout.STACK
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "diffusion" / f"stack-{hashlib.sha256(place.uri.encode()).hexdigest()[:12]}"


def _prefect_command(port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def _prefect_environment(store: str, port: int) -> dict[str, str]:
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder(store) / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",  # the UI would look on port 4200 otherwise
        "PREFECT_API_URL": "",
    }


def _mlflow_command(store: str, port: int) -> list[str]:
    place = Directory(store)
    database = (place.local_path if place.is_local else folder(store)) / layout.MLFLOW_DATABASE
    artifacts = place / layout.MLFLOW_ARTIFACTS
    root = artifacts.local_path.as_uri() if place.is_local else artifacts.uri
    servers = ["--host", HOST, "--port", str(port), "--workers", "1"]
    storage = ["--backend-store-uri", f"sqlite:///{database}", "--default-artifact-root", root, "--no-serve-artifacts"]
    return [sys.executable, "-m", "mlflow", "server", *servers, *storage]


def _ensure(store: str, name: str, port: int | None, command: list[str], environment: dict[str, str]) -> Service:
    running = next((service for service in status(store) if service.name == name and service.alive), None)
    if running:
        return running
    if port is not None and _answers(port):
        raise UserError(f"Port {port} is taken by another program: choose another with --{name}-port.")
    place = folder(store)
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **QUIET, **environment},
            start_new_session=True,
        )
    url = None if port is None else f"http://{HOST}:{port}"
    service = Service(name, process.pid, _started(process.pid), url, str(place / f"{name}.log"))
    (place / f"{name}.json").write_text(json.dumps(asdict(service), indent=2) + "\n")
    return service


def _wait_for(url: str, service: Service) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        if not service.alive:
            raise UserError(f"The {service.name} server did not start; its log {service.log} says why.")
        time.sleep(0.5)
    raise UserError(
        f"The {service.name} server does not answer after {START_TIMEOUT_S:.0f} s; see its log {service.log}."
    )


def _end(service: Service) -> None:
    """SIGTERM, then SIGKILL, to the session that the service leads."""
    for signum, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(service.pid, signum)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            _reap(service.pid)
            if not service.alive:
                return
            time.sleep(0.1)


def _reap(pid: int) -> None:
    """Of a child of this very process, take the exit status: it would stay a zombie and look alive."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _started(pid: int) -> str:
    """When a process started, as text that differs between two processes of the same id; empty if there is none."""
    if (PROC / "self/stat").exists():  # Linux, where slim images have no ps
        try:
            fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else f"{fields[19]} ticks after the boot"
    try:
        shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("stack: the program ps is needed to look after its processes; install it (procps).") from None
    state, _, started = shown.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else started.strip()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
