"""A Ray head that listens on loopback alone and asks for a token, which lies in a file that only its user can read."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from flows.stack.services import HOST

TOKEN = "ray-token"
_PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass(frozen=True)
class RayHead:
    """How a head is started, and how others use it."""

    words: Sequence[str]
    environment: Mapping[str, str]
    port: int
    """Of the dashboard and the Jobs API."""
    offers: Mapping[str, str]


def plan(folder: Path, before: Mapping[str, str]) -> RayHead:
    """A head on free ports, or where one that died was. Its token file is made by `make_token`, before it is started.

    Args:
        folder: where the token file lies.
        before: what a head that died offered, which others go on to use; empty if there was none.
    """
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    if before:
        ports["port"] = _port_in(before["RAY_ADDRESS"])
        ports["dashboard-port"] = _port_in(before["RAY_API_SERVER_ADDRESS"])
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN)}
    words = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    # Without the node's address Ray replaces 127.0.0.1 by that of a network interface and listens there.
    words += [f"--node-ip-address={HOST}", f"--dashboard-host={HOST}"]
    words += [f"--{name}={port}" for name, port in ports.items()]
    environment = {
        **token,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # jobs start `python`
        "RAY_ADDRESS": "",
    }
    offers = {
        **token,
        "RAY_ADDRESS": f"{HOST}:{ports['port']}",
        "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{ports['dashboard-port']}",
    }
    return RayHead(words, environment, ports["dashboard-port"], offers)


def make_token(folder: Path) -> None:
    """Write a new token, with mode 0600 from the first moment on."""
    path = folder / TOKEN
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _port_in(address: str) -> int:
    return int(address.rpartition(":")[2])


def _free_ports(count: int) -> list[int]:
    """Different free ports; they are let go before Ray takes them."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
