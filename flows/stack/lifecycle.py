"""The stack up and down."""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from diffusion_core.config import UserError
from flows import processes
from flows.runner import set_prefect_defaults
from flows.stack import pool, ray_head, services
from flows.stack.api import connected
from flows.stack.plan import TITLES, Command, Plan, check_free
from flows.stack.services import Service

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

START_TIMEOUT_S = 180.0
HEALTH = {"prefect": "/api/health", "mlflow": "/health", "ray": "/api/version"}

logger = logging.getLogger(__name__)


def up(wanted: Plan, limits: Mapping[str, int]) -> list[Service]:
    """Start what does not run yet, wait until it answers and the deployments exist, and return all services.

    Runs of before whose process is gone, as after a reboot, get their final state here.
    """
    store = wanted.store
    services.make_folder(store)
    servers = [_ensure(store, command) for command in wanted.servers]
    set_prefect_defaults()
    deployments = pool.deployments(store)  # imports much, while the servers do so too
    for server in servers:
        _wait_for(server)
    _fill(wanted, limits, deployments)
    workers = [_ensure(store, command) for command in wanted.workers]
    _wait_for_worker(wanted.api, workers[0])
    return [*servers, *workers]


def down(store: str) -> list[Service]:
    """End the runs that are going and then every service, the last started first; the services that were ended."""
    known = services.status(store)[::-1]
    ended = [service for service in known if service.alive]
    prefect = services.running(store, "prefect")
    for service in known:
        if service.name == "watcher":
            processes.end_group(service.process)
        elif service.name == "worker":
            _take_down(service, prefect)
    for service in known:
        processes.end_group(service.process)
    services.forget(store)
    return ended


def _fill(wanted: Plan, limits: Mapping[str, int], deployments: Sequence[RunnerDeployment]) -> None:
    """Bring pool, queues and deployments up to date, and settle the runs of before with their jobs."""
    from diffusion_core.jobs.orphans import stop_orphans
    from flows.stack import settle

    with connected(wanted.api) as client:
        asyncio.run(pool.prepare(limits))
        asyncio.run(pool.register(deployments))
        settle.settle(client, services.running(wanted.store, "worker"))
    stop_orphans(wanted.store)


def _take_down(worker: Service, prefect: Service | None) -> None:
    """End a worker, which passes the signal on to its runs, and give these their final state."""
    from flows.stack import settle

    try:
        with connected(f"{prefect.url}/api") if prefect else nullcontext() as client:
            going = settle.going(client) if client else []
            processes.end(worker.process)
            if client:
                settle.take_down(client, going)
    except Exception as error:  # the stack goes down whatever its server says
        logger.warning("The runs of the stack could not be ended in good order: %s", error)


def _ensure(store: str, command: Command) -> Service:
    if running := services.running(store, command.name):
        return running
    if dead := services.known(store, command.name):
        processes.end_group(dead.process)  # what it started may have outlived it
        if command.port and command.name in TITLES:
            check_free(command.name, command.port)
    place = services.folder(store)
    if command.name == "ray":
        ray_head.make_token(place)
    log = place / f"{command.name}.log"
    process = processes.start(command.words, command.environment, log)
    service = Service(
        command.name, process.pid, process.started, command.url, str(log), time.time(), command.offers, command.record
    )
    services.record(store, service)
    return service


def _wait_for(service: Service) -> None:
    """Until the server answers, whatever it answers: a Ray head wants a token first."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(urllib.error.URLError, OSError):
            if _answers(f"{service.url}{HEALTH[service.name]}"):
                return
        if not service.alive:
            raise UserError(f"The {service.name} server did not start; its log {service.log} says why.")
        time.sleep(0.5)
    raise UserError(
        f"The {service.name} server does not answer after {START_TIMEOUT_S:.0f} s; see its log {service.log}."
    )


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as answer:
        return answer.code in (401, 403)
    return True


def _wait_for_worker(api: str, worker: Service) -> None:
    """Until the worker has told the server of itself."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with connected(api) as client:
        while time.monotonic() < deadline:
            seen = [known.last_heartbeat_time for known in client.read_workers_for_work_pool(pool.POOL)]
            if any(at and at.timestamp() >= worker.since for at in seen):
                return
            if not worker.alive:
                break
            time.sleep(0.5)
    raise UserError(f"The worker did not start; its log {worker.log} says why.")
