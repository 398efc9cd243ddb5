"""The Ray cluster under a job: join the one that RAY_ADDRESS names, or start one in this machine for this job alone.

Ray waits for ever for resources that never come. So the workers of a job get theirs from a placement group, which is
there within `resources.start_timeout_s` or ends the job with a sentence. Ray Train does the same for itself.
"""

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
from diffusion_core.jobs.request import Resources

POLL_S = 1.0
_TOLD_AFTER_S = 3.0  # what a job waits for
_SECOND_TRY_S = 3.0  # for as many workers as there is room for
ENDPOINTS = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")

logger = logging.getLogger(__name__)


@contextmanager
def ray_session() -> Iterator[None]:
    """Have Ray initialised inside the block; it may be already (a job that calls another's work).

    A local cluster listens on loopback alone and ends with the block.

    Raises:
        UserError: RAY_ADDRESS cannot be reached.
    """
    if not os.environ.get("RAY_ADDRESS"):
        # Without it Ray replaces 127.0.0.1 by the machine's address and listens on every interface. Read at its import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    _start()
    try:
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


@contextmanager
def reserved(resources: Resources) -> Iterator[dict[str, Any]]:
    """Hold room for the workers of a job; yields the options of Ray with which each of them gets its share.

    Where others hold a part of the cluster, the job waits for room for all its workers, and at the end of the time-out
    takes what there is for some of them.

    Raises:
        UserError: no worker could start within `start_timeout_s`: what is missing, and how much of it is there or free.
    """
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = _placement_group(resources)
    try:
        options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
        if resources.accelerator_type:
            options["accelerator_type"] = resources.accelerator_type
        yield {**options, "scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
    finally:
        remove_placement_group(group)


def _placement_group(resources: Resources) -> Any:
    began = time.monotonic()
    group, told = _ask_for(resources, resources.workers), False
    while not group.wait(POLL_S):
        waited = time.monotonic() - began
        if waited >= resources.start_timeout_s:
            return _what_there_is(resources, group)
        if waited >= _TOLD_AFTER_S and not told:
            told = True
            logger.warning(
                "waiting up to %g s (resources.start_timeout_s) for %d workers: %s",
                resources.start_timeout_s,
                resources.workers,
                missing_resources(resources) or shortage(resources),
            )
    return group


def _what_there_is(resources: Resources, too_large: Any) -> Any:
    """Room for fewer workers, in place of the room for all that did not come."""
    from ray.util.placement_group import remove_placement_group

    missing, short = missing_resources(resources), shortage(resources)
    remove_placement_group(too_large)
    workers = 0 if missing else min(resources.workers - 1, _workers_that_fit(_free(), _need(resources)))
    while workers:
        group = _ask_for(resources, workers)
        if group.wait(_SECOND_TRY_S):
            logger.warning("only %d of %d workers could start: %s", workers, resources.workers, short)
            return group
        remove_placement_group(group)
        workers //= 2  # what is free may lie in pieces on many nodes
    raise too_small(resources, missing) if missing else busy(resources, short)


def _ask_for(resources: Resources, workers: int) -> Any:
    from ray.util.placement_group import placement_group

    return placement_group([_need(resources)] * workers, strategy="SPREAD" if resources.spread else "PACK")


def require_resources(resources: Resources) -> None:
    """Wait until the cluster's nodes can hold the workers, for a job that does not need `reserved`.

    Raises:
        UserError: after `start_timeout_s`, with the name of each missing resource, how much is needed and is there.
    """
    deadline = time.monotonic() + resources.start_timeout_s
    while missing := missing_resources(resources):
        if time.monotonic() >= deadline:
            raise too_small(resources, missing)
        time.sleep(POLL_S)


def too_small(resources: Resources, missing: str) -> UserError:
    return UserError(
        f"The Ray cluster is too small for resources.workers = {resources.workers}: {missing}"
        f" (waited {resources.start_timeout_s:g} s, resources.start_timeout_s)."
    )


def busy(resources: Resources, short: str) -> UserError:
    return UserError(
        f"resources.workers = {resources.workers} did not start within resources.start_timeout_s ="
        f" {resources.start_timeout_s:g}: {short}."
    )


def shortage(resources: Resources) -> str:
    """Which resource others hold, as text, in a cluster that would be large enough without them."""
    import ray

    free, there = _free(), ray.cluster_resources()
    short = [
        f"{_amount(amount * resources.workers)} {name} needed, {_amount(free.get(name, 0))} of"
        f" {_amount(there.get(name, 0))} free"
        for name, amount in _need(resources).items()
        if amount * resources.workers > free.get(name, 0)
    ]
    return ("; ".join(short) or f"no node has {_each(resources)} free") + " (other work on the cluster holds the rest)"


def _free() -> dict[str, float]:
    import ray

    free: dict[str, float] = ray.available_resources()
    return free


def missing_resources(resources: Resources) -> str:
    """What the cluster lacks for this request, as text; empty if every worker fits on some node."""
    import ray

    need = _need(resources)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if sum(_workers_that_fit(node, need) for node in nodes) >= resources.workers:
        return ""
    short = {name: sum(node.get(name, 0) for node in nodes) for name in need}
    lacking = [
        f"{_amount(amount * resources.workers)} {name} needed, {_amount(short[name])} there"
        for name, amount in need.items()
        if short[name] < amount * resources.workers
    ]
    return "; ".join(lacking) or f"no node has {_each(resources)} free for each worker"


def _need(resources: Resources) -> dict[str, float]:
    """What one worker needs, by Ray's names."""
    need = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if resources.accelerator_type:
        need[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    return {name: amount for name, amount in need.items() if amount}


def _each(resources: Resources) -> str:
    return " and ".join(f"{_amount(amount)} {name}" for name, amount in _need(resources).items())


def _workers_that_fit(node: dict[str, float], need: dict[str, float]) -> int:
    return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in need.items())


def _amount(value: float) -> str:
    return f"{value:g}"
