"""What the stages tell of themselves, and that it is told once, without secrets."""

import json
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from diffusion_core.config import UserError, identity
from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.stages.events import Event, failed
from diffusion_core.stages.register import RegisterRequest, RegisterResult, champion_changed, events
from diffusion_core.stages.registry import STAGES
from diffusion_core.stages.shard import STAGE, ShardRequest, ShardResult
from flows import cli_automation
from flows.cli import main
from flows.events import tell
from tests.posts import kept_posts
from tests.small_store import SmallStore


@pytest.fixture
def server():
    """What stands for a Prefect server, which keeps what it is sent, or refuses it."""
    with kept_posts() as posts, temporary_settings({PREFECT_API_URL: f"{posts.url}/api"}):
        yield posts


def told(server):
    """The events that the server was sent."""
    assert {path for path, _ in server.received} <= {"/api/events"}
    return [event for _, sent in server.received for event in sent]


def registered(**changes):
    result = {"seconds": 1, "reused": False, "model": "digits", "version": 3, "promoted": False, "reason": "Worse."}
    request = RegisterRequest(store="s", model="digits", bundle_uri="b", dataset_uri="d")
    return {event.name: event for event in events(request, RegisterResult(**{**result, "figures": {}, **changes}))}


def test_every_stage_tells_of_itself():
    assert all(entry.load().events for entry in STAGES.values())


def test_a_dataset_is_created_once_whether_it_was_made_or_found():
    source, dataset = SourceConfig(kind="digits"), DatasetConfig(name="digits")
    request = ShardRequest(store="s", source=source, dataset=dataset, preset="digits-flow")
    result = {"seconds": 1, "uri": "s/v", "version": "v", "splits": {"train": 9}, "rejected": 0, "shards": 1}
    (made,), (found,) = (STAGE.events(request, ShardResult(reused=reused, **result)) for reused in (False, True))
    assert made == found and made.resource == "diffusion.dataset.digits" and made.id
    assert made.payload["dataset"] == "digits" and made.payload["splits"] == {"train": 9}
    assert made.payload["preset"] == "digits-flow" and identity(request) == identity(
        request.model_copy(update={"preset": None})
    )


def test_a_version_is_champion_or_refused():
    champion = registered(promoted=True, previous=2)["diffusion.champion.changed"]
    assert champion.payload["previous"] == 2 and champion.id != registered(promoted=True)[champion.name].id
    refused = registered()["diffusion.gate.refused"]
    assert refused.payload["reason"] == "Worse." and set(registered()) == {refused.name, "diffusion.model.registered"}


def test_what_happens_once_is_told_once_and_without_secrets(server, store):
    once = Event("diffusion.dataset.created", "digits", {"uris": ["s3://key:secret@b/d?token=secret"]}, once="v")
    again = failed("train", RuntimeError("http://u:secret@host broke"), attempt=2)
    for _ in range(2):
        tell([once, again], store)
    names = [event["event"] for event in told(server)]
    assert sorted(names) == ["diffusion.dataset.created", "diffusion.stage.failed", "diffusion.stage.failed"]
    text = json.dumps(told(server))
    assert "secret" not in text and "s3://b/d" in text and store in text


def test_what_a_person_does_is_told_each_time_and_not_again_by_the_gate(server, store):
    by_hand = champion_changed("digits", 3, 2, "Set by hand.", by_hand=True)
    tell([by_hand, by_hand], store)
    tell(list(registered(promoted=True, previous=2).values()), store)
    names = [event["event"] for event in told(server)]
    assert names == ["diffusion.champion.changed", "diffusion.champion.changed", "diffusion.model.registered"]


def test_a_temporary_server_is_told_nothing_and_a_later_one_everything(server, store):
    event = Event("diffusion.dataset.created", "digits", once="v")
    with temporary_settings({PREFECT_API_URL: None}):
        tell([event], store)
    assert not Path(store, "events").exists()
    tell([event], store)
    assert len(told(server)) == 1


def test_what_a_server_did_not_take_is_told_by_the_next_run(server, store, caplog):
    event = Event("diffusion.dataset.created", "digits", once="v")
    server.status = 500
    tell([event], store)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        tell([event], store)
    assert [record.message.partition(" is not told: ")[0] for record in caplog.records] == [
        "The event diffusion.dataset.created of digits"
    ] * 2
    assert not Path(store, "events").exists()
    server.status = 204
    for _ in range(2):
        tell([event], store)
    assert len(told(server)) == 1


def test_what_cannot_be_told_stops_nobody(server, tmp_path):
    (tmp_path / "file").write_text("no folder")
    tell([Event("diffusion.dataset.created", "digits", once="v")], str(tmp_path / "file"))


def test_a_verb_that_needs_no_flow_tells_too(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"{server.url}/api")
    small = SmallStore(tmp_path)
    small.dataset("unused data")
    small.age(days=2)
    prune = ["prune", "--unused", "--older-than", "1h", "--store", small.uri]
    assert main(prune) == 0 and told(server) == []
    assert main([*prune, "--yes"]) == 0
    (event,) = told(server)
    assert event["event"] == "diffusion.store.pruned" and event["payload"]["things"] == 1
    assert event["payload"]["store"] == small.uri


def test_without_a_name_in_passwd_it_has_to_be_said_who_answers(monkeypatch):
    def no_entry():
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.setattr("getpass.getuser", no_entry)
    with pytest.raises(UserError, match="--by: say who answers"):
        cli_automation._user()
