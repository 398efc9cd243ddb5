"""What the stages tell of themselves, and that it is told once, without secrets."""

import json
from pathlib import Path

import pytest
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.stages.events import Event, failed
from diffusion_core.stages.register import RegisterRequest, RegisterResult, events
from diffusion_core.stages.registry import STAGES
from diffusion_core.stages.shard import STAGE, ShardRequest, ShardResult
from flows.events import tell


@pytest.fixture
def told():
    """The events that a server would have received."""
    AssertingEventsClient.reset()
    EventsWorker.set_client_override(AssertingEventsClient)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        yield received
        EventsWorker.instance().drain()
    EventsWorker.set_client_override(None)


def received():
    EventsWorker.instance().wait_until_empty()
    return [event for client in AssertingEventsClient.all for event in client.events]


def registered(**changes):
    result = {"seconds": 1, "reused": False, "model": "digits", "version": 3, "promoted": False, "reason": "Worse."}
    request = RegisterRequest(store="s", model="digits", bundle_uri="b", dataset_uri="d")
    return {event.name: event for event in events(request, RegisterResult(**{**result, "figures": {}, **changes}))}


def test_every_stage_tells_of_itself():
    assert all(entry.load().events for entry in STAGES.values())


def test_a_dataset_is_created_once_whether_it_was_made_or_found():
    request = ShardRequest(store="s", source=SourceConfig(kind="digits"), dataset=DatasetConfig(name="digits"))
    result = {"seconds": 1, "uri": "s/v", "version": "v", "splits": {"train": 9}, "rejected": 0, "shards": 1}
    (made,), (found,) = (STAGE.events(request, ShardResult(reused=reused, **result)) for reused in (False, True))
    assert made == found and made.resource == "diffusion.dataset.digits" and made.id
    assert made.payload["dataset"] == "digits" and made.payload["splits"] == {"train": 9}


def test_a_version_is_champion_or_refused():
    champion = registered(promoted=True, previous=2)["diffusion.champion.changed"]
    assert champion.payload["previous"] == 2 and champion.id != registered(promoted=True)[champion.name].id
    refused = registered()["diffusion.gate.refused"]
    assert refused.payload["reason"] == "Worse." and set(registered()) == {refused.name, "diffusion.model.registered"}


def test_what_happens_once_is_told_once_and_without_secrets(told, store):
    once = Event("diffusion.dataset.created", "digits", {"uris": ["s3://key:secret@b/d?token=secret"]}, once="v")
    again = failed("train", RuntimeError("http://u:secret@host broke"), attempt=2)
    for _ in range(2):
        tell([once, again], store)
    names = [event.event for event in told()]
    assert sorted(names) == ["diffusion.dataset.created", "diffusion.stage.failed", "diffusion.stage.failed"]
    text = json.dumps([event.model_dump(mode="json") for event in told()])
    assert "secret" not in text and "s3://b/d" in text and store in text


def test_a_temporary_server_is_told_nothing_and_a_later_one_everything(told, store):
    event = Event("diffusion.dataset.created", "digits", once="v")
    with temporary_settings({PREFECT_API_URL: None}):
        tell([event], store)
    assert not Path(store, "events").exists()
    tell([event], store)
    assert len(told()) == 1


def test_what_cannot_be_told_stops_nobody(told, tmp_path):
    (tmp_path / "file").write_text("no folder")
    tell([Event("diffusion.dataset.created", "digits", once="v")], str(tmp_path / "file"))
