"""Clients of one particular Prefect server, whatever the user's environment and profiles name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flows.runner import set_prefect_defaults

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


@contextmanager
def connected(url: str) -> Iterator[SyncPrefectClient]:
    """A client of the server whose API is at `url`; within the block all of Prefect uses this server."""
    set_prefect_defaults()
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client
