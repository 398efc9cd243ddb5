"""What may follow from an event without anybody's doing: the automations that the product brings, off by default.

They live in the Prefect server under names of their own. Enabling one makes it there or brings it up to date, and
disabling it keeps it, so that the UI shows it; neither ever makes a second one of the same name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, cast
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.events.actions import ActionTypes, CallWebhook, RunDeployment
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from diffusion_core.config import UserError
from diffusion_core.stages.overrides import WHERE
from diffusion_core.stages.settings import load_config, preset_names
from flows.server import prefect_server

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

PREFIX = "diffusion: "  # of their names in the Prefect server
TAG = "diffusion"  # of the runs that they look after
WEBHOOK_BLOCK, WEBHOOK_VARIABLE = "diffusion-webhook", "DIFFUSION_WEBHOOK_URL"
STUCK = timedelta(minutes=10)

_OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
_NOT_OF_A_PIPELINE = {"prefect.resource.role": "flow", "prefect.resource.name": "!diffusion-pipeline"}
_ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "TimedOut", "Cancelled")}
_MESSAGE = """{
  "text": {{ (event.event ~ ": " ~ event.resource.name ~ " " ~ (event.payload.reason or event.payload.error or
    event.resource["prefect.state-message"] or "")) | tojson }},
  "automation": {{ automation.name | tojson }},
  "event": {{ event.event | tojson }},
  "resource": {{ event.resource.id | tojson }},
  "occurred": {{ (event.occurred | string) | tojson }},
  "payload": {{ event.payload | tojson }}
}"""


@dataclass(frozen=True)
class Shipped:
    """An automation as it is shipped: what it waits for, and either the deployment that it runs or a webhook call."""

    name: str
    description: str
    trigger: EventTrigger
    deployment: str | None = None
    """The form that is run, as `flow/deployment`."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Its inputs, as templates of the event."""
    needs_preset: bool = False
    """Whether it has to be said what it starts from where the event names no preset."""


SHIPPED = (
    Shipped(
        "new-data-trains",
        "A new dataset version, made by anything but a pipeline (which trains on it anyway), is trained on.",
        EventTrigger(expect={"diffusion.dataset.created"}, match_related=[_OURS, _NOT_OF_A_PIPELINE]),
        "train-model/train",
        {
            "store": "{{ event.payload.store }}",
            "dataset": "{{ event.payload.dataset }}@{{ event.payload.version }}",
            "name": "{{ event.payload.dataset }}",
        },
        needs_preset=True,
    ),
    Shipped(
        "champion-generates",
        "A new champion makes an image set.",
        EventTrigger(expect={"diffusion.champion.changed"}),
        "generate-images/generate",
        {
            "store": "{{ event.payload.store }}",
            "model": "{{ event.payload.model }}/{{ event.payload.version }}",
        },
    ),
    Shipped(
        "notify",
        "A run that failed, crashed or is late, a refused gate, and a question to a person call a webhook.",
        EventTrigger(
            expect={
                *(f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut", "Late")),
                "diffusion.gate.refused",
                "diffusion.approval.asked",
            },
            match_related=_OURS,
        ),
    ),
    Shipped(
        "notify-stuck",
        f"A run that does not get going, or was silent, for {STUCK.seconds // 60} minutes calls a webhook.",
        EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Pending", "prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.Running", "prefect.flow-run.heartbeat", "prefect.flow-run.Paused", *_ENDED},
            for_each={"prefect.resource.id"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_OURS,
            within=STUCK,
        ),
    ),
)
NAMES = tuple(shipped.name for shipped in SHIPPED)


def states() -> dict[str, bool | None]:
    """By name: True if enabled, False if disabled, None if the server does not know it."""
    with prefect_server() as client:
        found = {shipped.name: _existing(client, shipped) for shipped in SHIPPED}
    return {name: None if automation is None else automation.enabled for name, automation in found.items()}


def enable(
    name: str, webhook_variable: str = WEBHOOK_VARIABLE, preset: str | None = None, settings: Sequence[str] = ()
) -> None:
    """Make an automation in the Prefect server, or bring it up to date, and enable it.

    Args:
        name: one of `NAMES`.
        webhook_variable: name of the environment variable with the address of the webhook. It is a secret: it is kept
            encrypted in a block of the server, and shown nowhere. If it is not set, the address that is kept counts.
        preset: which one the run starts from, where the event names none.
        settings: fields in which its runs differ from the preset, as `training.images=64000`.

    Raises:
        UserError: there is no such automation, deployment, address, preset or field.
    """
    shipped = _shipped(name)
    if shipped.deployment is None and (preset is not None or settings):
        raise UserError(f"automation {name}: it calls a webhook, and takes neither --preset nor --set.")
    with prefect_server() as client:
        action = _action(client, shipped, webhook_variable, preset, settings)
        wanted = AutomationCore(
            name=PREFIX + name,
            description=shipped.description,
            enabled=True,
            tags=[TAG],
            trigger=shipped.trigger,
            actions=[action],
        )
        existing = _existing(client, shipped)
        if existing is None:
            client.create_automation(wanted)
        else:
            # An update sends the fields that were set: all of them, but the owner that the server gave it.
            whole = wanted.model_dump(exclude={"owner_resource"})
            client.update_automation(existing.id, AutomationCore.model_validate(whole))


def disable(name: str) -> None:
    """Disable an automation, which stays in the server; one that is not there is disabled already."""
    with prefect_server() as client:
        if existing := _existing(client, _shipped(name)):
            client.pause_automation(existing.id)


def _shipped(name: str) -> Shipped:
    for shipped in SHIPPED:
        if shipped.name == name:
            return shipped
    raise UserError(f"automation {name}: there is no such automation; accepted are {', '.join(NAMES)}.")


def _existing(client: SyncPrefectClient, shipped: Shipped) -> Automation | None:
    return next(iter(client.read_automations_by_name(PREFIX + shipped.name)), None)


def _action(
    client: SyncPrefectClient, shipped: Shipped, variable: str, preset: str | None, settings: Sequence[str]
) -> ActionTypes:
    if shipped.deployment is None:
        return CallWebhook(block_document_id=_webhook(client, variable), payload=_MESSAGE)
    _check_preset(shipped, preset)
    load_config(preset, settings=settings, source_needed=False)
    try:
        found = client.read_deployment_by_name(shipped.deployment)
    except ObjectNotFound:
        missing = f"the Prefect server has no deployment {shipped.deployment}"
        raise UserError(f"automation {shipped.name}: {missing}.") from None
    inputs = dict(shipped.parameters)
    if preset is not None:
        inputs["preset"] = "{{ (event.payload.preset or '" + preset + "') }}"
    if settings:
        inputs[WHERE] = "\n".join(settings)
    return RunDeployment(source="selected", deployment_id=found.id, parameters=inputs)


def _check_preset(shipped: Shipped, preset: str | None) -> None:
    accepted = f"accepted are {', '.join(preset_names())}"
    if preset is None and shipped.needs_preset:
        raise UserError(
            f"automation {shipped.name}: --preset: say what it starts from where data names none; {accepted}."
        )
    if preset is not None and preset not in preset_names():
        raise UserError(f"automation {shipped.name}: --preset: there is no preset {preset}; {accepted}.")


def _webhook(client: SyncPrefectClient, variable: str) -> UUID:
    """The block that holds the address of the webhook."""
    if url := os.environ.get(variable):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{variable}: the address of a webhook begins with https:// or http://.")
        block = Webhook(url=url, headers={"Content-Type": "application/json"})
        return cast(UUID, block.save(WEBHOOK_BLOCK, overwrite=True))
    try:
        return client.read_block_document_by_name(WEBHOOK_BLOCK, "webhook", include_secrets=False).id
    except ObjectNotFound:
        raise UserError(
            f"{variable}: set this environment variable to the address of the webhook, which is kept as a secret."
        ) from None
