"""The Ray cluster under a job: join the one that RAY_ADDRESS names, or start one in this machine for this job alone."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from diffusion_core.config import UserError
from diffusion_core.jobs.requests import Resources

POLL_S = 1.0
ENDPOINTS = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")

logger = logging.getLogger(__name__)


@contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """Have Ray initialised inside the block, with the requested resources at hand.

    Within an initialised Ray (a job that calls another's work) this only waits for the resources. A local cluster
    listens on loopback alone and ends with the block.

    Raises:
        UserError: the cluster cannot hold the request within `start_timeout_s`, or RAY_ADDRESS cannot be reached.
    """
    if not os.environ.get("RAY_ADDRESS"):
        # Without it Ray replaces 127.0.0.1 by the machine's address and listens on every interface. Read at its import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        require_resources(resources)
        yield
        return
    _start()
    try:
        require_resources(resources)
        yield
    finally:
        ray.shutdown()


def _start() -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING, "configure_logging": False}
    if not address:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        return
    try:
        ray.init(address=address, runtime_env={"env_vars": _endpoints()}, **quiet)
    except ConnectionError as error:
        raise UserError(f"The Ray cluster that RAY_ADDRESS names, {address}, cannot be reached: {error}") from error


def _endpoints() -> dict[str, str]:
    """Where the services are, for workers on other nodes. Credentials are never handed on: nodes have their own."""
    found = {name: os.environ[name] for name in ENDPOINTS if os.environ.get(name)}
    for name in [name for name, value in found.items() if urlsplit(value).password]:
        logger.warning("%s holds a password and is not handed to the workers: set it on their nodes.", name)
        del found[name]
    return found


def require_resources(resources: Resources) -> None:
    """Wait until the cluster's nodes can hold the workers; a cluster that scales by itself may take some time to.

    Raises:
        UserError: after `start_timeout_s`, with the name of each missing resource, how much is needed and is there.
    """
    deadline = time.monotonic() + resources.start_timeout_s
    while missing := missing_resources(resources):
        if time.monotonic() >= deadline:
            raise UserError(
                f"The Ray cluster is too small for resources.workers = {resources.workers}: {missing}"
                f" (waited {resources.start_timeout_s:g} s, resources.start_timeout_s)."
            )
        time.sleep(POLL_S)


def missing_resources(resources: Resources) -> str:
    """What the cluster lacks for this request, as text; empty if every worker fits on some node."""
    import ray

    need = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if resources.accelerator_type:
        need[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    need = {name: amount for name, amount in need.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if sum(_workers_that_fit(node, need) for node in nodes) >= resources.workers:
        return ""
    short = {name: sum(node.get(name, 0) for node in nodes) for name in need}
    lacking = [
        f"{_amount(amount * resources.workers)} {name} needed, {_amount(short[name])} there"
        for name, amount in need.items()
        if short[name] < amount * resources.workers
    ]
    return "; ".join(lacking) or "no node has " + " and ".join(f"{_amount(n)} {name}" for name, n in need.items()) + (
        " free for each worker"
    )


def _workers_that_fit(node: dict[str, float], need: dict[str, float]) -> int:
    return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in need.items())


def _amount(value: float) -> str:
    return f"{value:g}"
