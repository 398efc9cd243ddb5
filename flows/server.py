"""Which store is meant, and which Prefect server: that of the environment, or of the stack that runs for the store."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flows.options import DEFAULT_STORE

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from diffusion_core.stages.events import Event


def place(store: str | None) -> str:
    """The store that is meant; a stack that runs for it serves its records."""
    from flows.stack import services

    services.adopt(store or DEFAULT_STORE)
    return store or DEFAULT_STORE


def prepared(store: str | None) -> str:
    """The store that is meant, after Prefect was told which server to use."""
    from flows.runner import prepare_prefect

    found = place(store)
    prepare_prefect()
    return found


def prefect_server() -> SyncPrefectClient:
    """A client of the server; UserError if there is none, as a temporary one would keep nothing."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from diffusion_core.config import UserError

    if not (os.environ.get("PREFECT_API_URL") or PREFECT_API_URL.value()):
        raise UserError("There is no Prefect server: start one with diffusion stack up, or set PREFECT_API_URL.")
    return get_client(sync_client=True)


def tell(events: Iterable[Event], store: str) -> None:
    """Tell the server, if there is one, of what a verb did without a flow."""
    if os.environ.get("PREFECT_API_URL"):
        from flows import events as told

        told.tell(events, store)
