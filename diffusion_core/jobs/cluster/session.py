"""The Ray session of a job: join the cluster that RAY_ADDRESS names, or start one in this machine for the job."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from diffusion_core import progress
from diffusion_core.config import UserError
from diffusion_core.jobs.account import keeper
from diffusion_core.jobs.cluster import metrics
from diffusion_core.jobs.transport import GONE, wrong_token

ENDPOINTS = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")

_ANSWER_S = 10.0

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
    progress.listeners.append(metrics.of_progress)
    try:
        yield
    finally:
        progress.listeners.remove(metrics.of_progress)
        with keeper().workers_ending():
            ray.shutdown()


def _start() -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING, "configure_logging": False}
    if not address:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        return
    check_cluster()
    try:
        ray.init(address=address, runtime_env={"env_vars": _endpoints()}, **quiet)
    except ConnectionError as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, why: str) -> UserError:
    return UserError(f"The Ray cluster that RAY_ADDRESS names, {address}, cannot be reached: {why.rstrip('.')}. {GONE}")


def check_cluster() -> None:
    """The cluster that RAY_ADDRESS names is there and takes this process's token.

    Ray itself would try for more than a minute, and not say of a token why it is refused.

    Raises:
        UserError: it is not so. Of a cluster that is not named by host and port, or is slow, nothing is said.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not re.fullmatch(r"[^/:]+:\d+", address):
        return
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    from ray.exceptions import AuthenticationError

    refused = UserError(wrong_token(f"The Ray cluster that RAY_ADDRESS names, {address},"))
    try:
        with init_grpc_channel(address) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=_ANSWER_S)
    except AuthenticationError:  # there is no token to send
        raise refused from None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise refused from None
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise _unreachable(address, "nothing answers there") from None


def _endpoints() -> dict[str, str]:
    """Where the services are, for workers on other nodes. Credentials are never handed on: nodes have their own."""
    found = {name: os.environ[name] for name in ENDPOINTS if os.environ.get(name)}
    for name in [name for name, value in found.items() if urlsplit(value).password]:
        logger.warning("%s holds a password and is not handed to the workers: set it on their nodes.", name)
        del found[name]
    return found
