"""What this process has stored and how often it asked S3, counted where it happens."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple


class Traffic(NamedTuple):
    """Bytes handed to the store, and requests sent to S3, repeated ones included."""

    bytes_written: int = 0
    s3_requests: int = 0

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        return Traffic(self.bytes_written + other.bytes_written, self.s3_requests + other.s3_requests)

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.bytes_written - before.bytes_written, self.s3_requests - before.s3_requests)


_lock = threading.Lock()
_so_far = Traffic()


def so_far() -> Traffic:
    """Of this process since it began."""
    return _so_far


def wrote(size: int) -> None:
    """The store took so many bytes."""
    _count(Traffic(bytes_written=size))


def count_requests(client: Any) -> Any:
    """An S3 client of boto3, each of whose requests counts from now on."""
    client.meta.events.register("before-send.s3", _sent)
    return client


def _sent(**_: Any) -> None:
    _count(Traffic(s3_requests=1))


def _count(more: Traffic) -> None:
    global _so_far
    with _lock:
        _so_far += more
