"""Events of the stages, told to the Prefect server: the one place that emits them.

Each is related to the flow run, flow, deployment and tags of the run that it comes from, as Prefect's own are. Once the
server has it, that is written down in the store, so that a stage which is found done is silent, and what the server
did not get, as it was away or the flow died, is told by the next run. A temporary server is told nothing: nobody
listens there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.client.orchestration import get_client
from prefect.events import Event as PrefectEvent
from prefect.events.related import related_resources_from_run_context
from prefect.settings import PREFECT_API_URL
from prefect.utilities.asyncutils import run_coro_as_sync

from diffusion_core.stages.events import Event
from diffusion_core.store import Directory, layout
from diffusion_core.tracking import without_secrets

PATIENCE_S = 10.0  # with the server, for each event: meanwhile the flow waits

_log = logging.getLogger(__name__)


def tell(events: Iterable[Event], store: str) -> None:
    """Tell the Prefect server of events, each that can happen only once at least once: twice after a crash.

    Never raises: what is told of has happened, whether anybody hears of it or not.
    """
    if not PREFECT_API_URL.value():
        return
    for event in events:
        try:
            _tell(event, Directory(store))
        except Exception as error:
            _log.warning("The event %s of %s is not told: %s", event.name, event.thing, without_secrets(repr(error)))


def _tell(event: Event, store: Directory) -> None:
    told = event.id and layout.event(event.id)
    if told and not event.repeats and store.exists(told):
        return
    run_coro_as_sync(_send(event, clean({**event.payload, "store": store.uri})))
    if told:
        store.create_json(told, {"event": event.name, "resource": event.resource, "once": event.once})


async def _send(event: Event, payload: dict[str, Any]) -> None:
    """Hand an event to the server. `emit_event` would put it in a queue of this process, and lose it with that."""
    resource: Any = {"prefect.resource.id": event.resource, "prefect.resource.name": event.thing}
    async with asyncio.timeout(PATIENCE_S), get_client() as client:
        related = await related_resources_from_run_context(client)
        sent = PrefectEvent(event=event.name, resource=resource, related=related, payload=payload)
        await client.request("POST", "/events", json=[sent.model_dump(mode="json")])  # raises what is no success


def clean(value: Any) -> Any:
    """Plain values, without credentials in any URI."""
    if isinstance(value, Mapping):
        return {name: clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
