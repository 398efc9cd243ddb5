"""A real S3 service for tests: OpenStack Swift with its `s3api` middleware, four processes on 127.0.0.1.

Unlike a mock it checks signatures, decides conditional writes, and can be reached by every client of every process
(boto3, pyarrow, MLflow, Ray workers). Its folder must lie on a file system with extended attributes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ROOT = Path(__file__).parent.parent
ACCESS_KEY, SECRET_KEY = "diffusion:tester", "testing-secret"
START_SECONDS, STOP_SECONDS = 60, 10
FILTERS = (
    "catch_errors", "gatekeeper", "full", "atomic", "healthcheck", "cache", "listing_formats", "s3api", "tempauth",
    "copy", "slo", "dlo", "versioned_writes", "symlink",
)  # fmt: skip
FACTORIES = {
    "full": "paste.filter_factory = tests.swift_full:filter_factory\nmarker = {folder}/full",
    "atomic": "paste.filter_factory = tests.swift_atomic:filter_factory",
    "tempauth": f"use = egg:swift#tempauth\nuser_{ACCESS_KEY.replace(':', '_')} = {SECRET_KEY} .admin",
    "s3api": "use = egg:swift#s3api\nlocation = us-east-1",
    # Port 1: whatever memcached the machine may have is none of ours, and Swift does without.
    "cache": "use = egg:swift#memcache\nmemcache_servers = 127.0.0.1:1",
}

SERVER = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
log_level = ERROR

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
recon_cache_path = {folder}
"""

PROXY = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
log_level = ERROR

[pipeline:main]
pipeline = {pipeline}

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
"""

CONFIGURATION = """\
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests

[storage-policy:0]
name = default
default = yes
"""


class SwiftServer:
    """A running service: its endpoint and the environment that points every S3 client to it."""

    def __init__(self, endpoint: str, processes: list[subprocess.Popen[bytes]], full: Path) -> None:
        self.endpoint = endpoint
        self.processes = processes
        self._full = full

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
        }

    @contextmanager
    def full(self) -> Iterator[None]:
        """Within the block the service takes no objects, because its quota is used up."""
        self._full.touch()
        try:
            yield
        finally:
            self._full.unlink()

    def make_bucket(self, bucket: str) -> None:
        self.client.create_bucket(Bucket=bucket)

    @cached_property
    def client(self) -> Any:
        """Of boto3, made once: that takes it a tenth of a second of work."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=20),
        )


@contextmanager
def swift_server(folder: Path) -> Iterator[SwiftServer]:
    """Start a service whose data, configuration and logs lie in `folder`; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "devices" / "d1").mkdir(parents=True)
    (folder / "swift.conf").write_text(CONFIGURATION)
    ports = dict(zip(("account", "container", "object", "proxy"), _free_ports(4), strict=True))
    user = _user()
    for kind in ("account", "container", "object"):
        _make_ring(folder, kind, ports[kind])
        (folder / f"{kind}.conf").write_text(SERVER.format(port=ports[kind], user=user, folder=folder, kind=kind))
    proxy = PROXY.format(port=ports["proxy"], user=user, folder=folder, pipeline=" ".join((*FILTERS, "proxy-server")))
    factories = {name: text.format(folder=folder) for name, text in FACTORIES.items()}
    filters = [f"\n[filter:{name}]\n{factories.get(name, f'use = egg:swift#{name}')}\n" for name in FILTERS]
    (folder / "proxy.conf").write_text(proxy + "".join(filters))
    server = SwiftServer(f"http://127.0.0.1:{ports['proxy']}", [], folder / "full")
    try:
        for kind in ports:
            server.processes.append(_start(folder, kind))
        _wait(server, folder)
        yield server
    finally:
        for process in server.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in server.processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _program(name: str) -> list[str]:
    return [sys.executable, str(Path(sys.executable).with_name(name))]


def _make_ring(folder: Path, kind: str, port: int) -> None:
    builder = str(folder / f"{kind}.builder")
    for arguments in (["create", "4", "1", "1"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"]):
        command = [*_program("swift-ring-builder"), builder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode > 1:  # 1 is a warning
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def _start(folder: Path, kind: str) -> subprocess.Popen[bytes]:
    with open(folder / f"{kind}.log", "wb") as log:
        return subprocess.Popen(
            [*_program(f"swift-{kind}-server"), str(folder / f"{kind}.conf"), "-v"],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
        )


def _wait(server: SwiftServer, folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        for process in server.processes:
            if process.poll() is not None:
                raise RuntimeError("Swift ended at its start:\n" + _logs(folder))
        try:
            server.make_bucket("ready")
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"Swift gave no answer in {START_SECONDS} seconds:\n" + _logs(folder))


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
