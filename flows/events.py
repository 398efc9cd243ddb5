"""Events of the stages, told to the Prefect server: the one place that emits them.

Prefect itself relates each to the flow run, flow, deployment and tags of the run that it comes from. That an event was
told is written down in the store, so that a stage which is found done is silent, and one whose flow died before it
could tell of it is told of by the next run. A temporary server is told nothing: nobody listens there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from diffusion_core.stages.events import Event
from diffusion_core.store import Directory, layout
from diffusion_core.tracking import without_secrets

_log = logging.getLogger(__name__)


def tell(events: Iterable[Event], store: str) -> None:
    """Tell the Prefect server of events, each that can happen only once at most once (twice after a crash).

    Never raises: what is told of has happened, whether anybody hears of it or not.
    """
    if not PREFECT_API_URL.value():
        return
    for event in events:
        try:
            _tell(event, Directory(store))
        except Exception as error:
            _log.warning("The event %s of %s is not told: %s", event.name, event.thing, without_secrets(error))


def _tell(event: Event, store: Directory) -> None:
    told = event.id and layout.event(event.id)
    if told and store.exists(told):
        return
    resource = {"prefect.resource.id": event.resource, "prefect.resource.name": event.thing}
    emit_event(event.name, resource=resource, payload=clean({**event.payload, "store": store.uri}))
    if told:
        store.create_json(told, {"event": event.name, "resource": event.resource, "once": event.once})


def clean(value: Any) -> Any:
    """Plain values, without credentials in any URI."""
    if isinstance(value, Mapping):
        return {name: clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
