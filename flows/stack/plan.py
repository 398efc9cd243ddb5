"""What a stack is to consist of: its services, their commands and ports, and the MLflow that keeps its record.

Whatever forbids it is said here, before anything is started.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout
from diffusion_core.tracking import tracking_uri, without_secrets
from diffusion_core.tracking.pages import UI as MLFLOW_UI
from flows.stack import ray_head, services
from flows.stack.pool import POOL
from flows.stack.services import HOST, port_of

PORTS = {"prefect": 4200, "mlflow": 5000}
TITLES = {"prefect": "Prefect", "mlflow": "MLflow"}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
WORKER_SETTINGS = {
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # a run starts this soon after it was asked for
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
    "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "10",  # for when the server's event about a cancel is lost
}


@dataclass(frozen=True)
class Command:
    """A program of the stack, what its environment has beside that of the user, and what it offers others in theirs."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    offers: Mapping[str, str] = field(default_factory=dict)
    record: str | None = None

    @property
    def url(self) -> str | None:
        return None if self.port is None else f"http://{HOST}:{self.port}"


@dataclass(frozen=True)
class Plan:
    """What `stack up` makes true: servers, and what works for them once they answer."""

    store: str
    servers: Sequence[Command]
    workers: Sequence[Command]
    api: str


def make(store: str, prefect_port: int | None, mlflow_port: int | None, with_ray: bool) -> Plan:
    """The plan for a store.

    Raises:
        UserError: a port is taken, or is not the one that a running service has; or the stack runs with another MLflow
            than the one that is asked for.
    """
    named = _named_mlflow(store)
    ports = {"prefect": _port(store, "prefect", prefect_port)}
    if named and mlflow_port:
        raise UserError(
            f"--mlflow-port: MLFLOW_TRACKING_URI names {without_secrets(named)}, so that no MLflow is started here; "
            "leave one of them out."
        )
    if not named:
        ports["mlflow"] = _port(store, "mlflow", mlflow_port)
    if len(set(ports.values())) < len(ports):
        raise UserError(f"--mlflow-port: {ports['mlflow']} is to be Prefect's port already; choose another one.")
    servers = [_prefect(store, ports["prefect"])]
    if not named:
        servers.append(_mlflow(store, ports["mlflow"]))
    if with_ray or services.known(store, "ray"):
        servers.append(_ray(store, _offers(servers)))  # its jobs run in its environment
    environment = _offers(servers)
    record = named or environment.get("MLFLOW_TRACKING_URI") or tracking_uri(store)
    worker = _worker(environment, without_secrets(record))
    _check_same_record(store, worker)
    return Plan(store, servers, [worker, _watcher(store, environment)], environment["PREFECT_API_URL"])


def _port(store: str, name: str, asked: int | None) -> int:
    """The port of a service, or a free one. One that died gets its own again: whatever lives looks for it there."""
    option = f"--{name}-port"
    service = services.known(store, name)
    own = port_of(service) if service else None
    if own and asked not in (None, own) and any(other.alive for other in services.status(store)):
        raise UserError(
            f"{option}: {TITLES[name]} of this store's stack runs on port {own} already; leave the option out, or end "
            f"the stack first with diffusion stack down."
        )
    port = asked or own or PORTS[name]
    if port != own:  # of one that died something may live on there, which is ended first
        check_free(name, port)
    return port


def check_free(name: str, port: int) -> None:
    """Nothing listens on the port of a service that is to start, or the sentence says whose it is."""
    if _answers(port):
        other = services.holder(port)
        by = f"the stack of the store {other}" if other else "another program"
        raise UserError(f"--{name}-port: port {port} is taken by {by}; choose another one for {TITLES[name]}.")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _named_mlflow(store: str) -> str | None:
    """The MLflow that the user's environment names, unless it is that of this very stack."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    own = services.known(store, "mlflow")
    return None if own and named and named.rstrip("/") == own.url else named


def _check_same_record(store: str, worker: Command) -> None:
    running = services.running(store, "worker")
    if running and running.record and running.record != worker.record:
        raise UserError(
            f"MLFLOW_TRACKING_URI: this store's stack runs with the MLflow {running.record}, and the environment asks "
            f"for {worker.record}; end the stack first with diffusion stack down."
        )


def _prefect(store: str, port: int) -> Command:
    words = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    environment = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{services.folder(store) / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",  # the UI would look on port 4200 otherwise
        "PREFECT_API_URL": "",
    }
    return Command("prefect", words, environment, port, offers={"PREFECT_API_URL": f"http://{HOST}:{port}/api"})


def _mlflow(store: str, port: int) -> Command:
    place = Directory(store)
    database = (place.local_path if place.is_local else services.folder(store)) / layout.MLFLOW_DATABASE
    artifacts = place / layout.MLFLOW_ARTIFACTS
    root = artifacts.local_path.as_uri() if place.is_local else artifacts.uri
    servers = ["--host", HOST, "--port", str(port), "--workers", "1"]
    storage = ["--backend-store-uri", f"sqlite:///{database}", "--default-artifact-root", root, "--no-serve-artifacts"]
    words = [sys.executable, "-m", "mlflow", "server", *servers, *storage]
    # Of a local store everyone opens the database itself, with or without the server, which then only shows it.
    offers = {MLFLOW_UI if place.is_local else "MLFLOW_TRACKING_URI": f"http://{HOST}:{port}"}
    return Command("mlflow", words, QUIET, port, offers)


def _offers(servers: Sequence[Command]) -> dict[str, str]:
    return {name: value for server in servers for name, value in server.offers.items()}


def _ray(store: str, environment: Mapping[str, str]) -> Command:
    service = services.known(store, "ray")
    if service and service.alive:
        return Command("ray", (), port=port_of(service), offers=service.offers)
    head = ray_head.plan(services.folder(store), service.offers if service else {})
    return Command("ray", head.words, {**environment, **head.environment}, head.port, head.offers)


def _worker(environment: Mapping[str, str], record: str) -> Command:
    pool = ["--pool", POOL, "--type", "process", "--install-policy", "never"]
    words = [sys.executable, "-m", "prefect", "worker", "start", *pool]
    return Command("worker", words, {**QUIET, **WORKER_SETTINGS, **environment}, record=record)


def _watcher(store: str, environment: Mapping[str, str]) -> Command:
    words = [sys.executable, "-m", "flows.stack.watch", "--store", Directory(store).uri]
    return Command("watcher", words, environment)
