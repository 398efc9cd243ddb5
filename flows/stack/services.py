"""What was started for a store, as `<folder>/<service>.json`, and where a stack keeps its files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffusion_core.store import Directory, layout
from flows.processes import Process

HOST = "127.0.0.1"
SERVICES = ("prefect", "mlflow", "ray", "worker", "watcher")  # in the order of their start
_BEFORE = ("deployments",)  # what an older version served its deployments with


@dataclass(frozen=True)
class Service:
    """One process of the stack."""

    name: str
    pid: int
    started: str
    url: str | None
    log: str
    since: float = 0.0
    """Seconds of the epoch at which it was started."""
    offers: Mapping[str, str] = field(default_factory=dict)
    """Variables of the environment with which others use it."""
    record: str | None = None
    """URI, without credentials, of the MLflow that the runs of a worker report to."""

    @property
    def process(self) -> Process:
        return Process(self.pid, self.started)

    @property
    def alive(self) -> bool:
        return self.process.alive


def status(store: str) -> list[Service]:
    """The services that were started for this store, alive or not."""
    return _read(folder(store))


def known(store: str, name: str) -> Service | None:
    """The service of this name, if it was started for the store and not taken down; it may have died."""
    return next((service for service in status(store) if service.name == name), None)


def running(store: str, name: str) -> Service | None:
    """The service of this name, if it was started for the store and lives."""
    service = known(store, name)
    return service if service and service.alive else None


def record(store: str, service: Service) -> None:
    """Write down what was started, in the stack's folder and, for stacks of other stores to find it, by the user."""
    (folder(store) / f"{service.name}.json").write_text(json.dumps(asdict(service), indent=2) + "\n")
    known = _known_stacks()
    known.mkdir(parents=True, exist_ok=True)
    where = {"store": Directory(store).uri, "folder": str(folder(store))}
    (known / f"{_digest(store)}.json").write_text(json.dumps(where) + "\n")


def forget(store: str) -> None:
    """Take the records of all services away."""
    for name in (*SERVICES, *_BEFORE):
        (folder(store) / f"{name}.json").unlink(missing_ok=True)
    (_known_stacks() / f"{_digest(store)}.json").unlink(missing_ok=True)


def holder(port: int) -> str | None:
    """The store whose stack has a living service on this port, None if no stack of this user has one."""
    for uri, service in _of_all_stacks():
        if service.alive and service.url and port_of(service) == port:
            return uri
    return None


def port_of(service: Service) -> int:
    """The port of a service that has a URL."""
    return int(str(service.url).rpartition(":")[2])


def adopt(store: str) -> None:
    """Use the servers of this store's stack, if it runs, where the environment names no others."""
    for name in ("prefect", "mlflow"):
        if service := running(store, name):
            for variable, value in service.offers.items():
                os.environ.setdefault(variable, value)


def folder(store: str) -> Path:
    """Where the stack of a store keeps its process ids, logs and databases: in the store, or in the user's data folder.

    The databases of a store on S3 are its registry: they are never in a cache folder, which may be emptied at any time.
    """
    place = Directory(store)
    if place.is_local:
        return place.local_path / layout.STACK
    return _home("XDG_DATA_HOME", ".local/share") / f"stack-{_digest(store)}"


def make_folder(store: str) -> Path:
    """The folder, which is there afterwards; that of an older version is moved out of the cache."""
    here = folder(store)
    old = _home("XDG_CACHE_HOME", ".cache") / here.name
    if old.is_dir() and not here.exists() and not any(service.alive for service in _read(old)):
        here.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(old, here)
    here.mkdir(parents=True, exist_ok=True)
    return here


def _read(place: Path) -> list[Service]:
    found = []
    for name in (*SERVICES, *_BEFORE):
        with suppress(OSError, ValueError, TypeError):
            found.append(Service(**json.loads((place / f"{name}.json").read_text())))
    return found


def _of_all_stacks() -> Iterator[tuple[str, Service]]:
    for file in sorted(_known_stacks().glob("*.json")):
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(file.read_text())
            for service in _read(Path(known["folder"])):
                yield str(known["store"]), service


def _known_stacks() -> Path:
    return _home("XDG_CACHE_HOME", ".cache") / "stacks"


def _home(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "diffusion"


def _digest(store: str) -> str:
    return hashlib.sha256(Directory(store).uri.encode()).hexdigest()[:12]
