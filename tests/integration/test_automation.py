"""What follows from an event, and what a person is asked: with a real Prefect server, which is also started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect import flow, tags
from prefect.settings import PREFECT_API_URL, temporary_settings

from diffusion_core import tracking
from diffusion_core.config import UserError
from diffusion_core.stages.events import Event
from diffusion_core.stages.register import RegisterResult
from diffusion_core.store.patience import StoreUnavailable
from diffusion_core.tracking import approval
from diffusion_core.tracking.approval import Answer, Question
from flows import approval as waiting
from flows import automations, events
from tests.local_stack import free_port, wait_for
from tests.posts import kept_posts
from tests.tiny_bundle import tiny_bundle

SECRET = "t0ken-in-the-address"


class Server:
    """A Prefect server on a database of its own that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.url = f"http://127.0.0.1:{self._port}/api"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", self._port]
        database = f"sqlite+aiosqlite:///{self._folder / 'prefect.db'}"
        environment = {**os.environ, "PREFECT_API_URL": "", "PREFECT_SERVER_DATABASE_CONNECTION_URL": database}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_for(self._answers, "the Prefect server", 120)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def post(self, path: str, body: Any) -> Any:
        answer = httpx.post(f"{self.url}/{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("prefect"))
    try:
        server.start()
        with temporary_settings({PREFECT_API_URL: server.url}):
            yield server
    finally:
        server.stop()


@flow(name="generate-images")
def generates(model: str, store: str, preset: str = "") -> None:
    return


@flow(name="train-model")
def trains(dataset: str, name: str, store: str, preset: str = "", overrides: str = "") -> None:
    return


@flow(name="register-model")
def changes_the_champion(store: str) -> None:
    champion = Event("diffusion.champion.changed", "digits", {"model": "digits", "version": 7}, once="digits/7")
    events.tell([champion, champion, Event("diffusion.gate.refused", "digits", {"reason": "Worse."})], store)


@flow(name="shard-dataset")
def makes_data(store: str) -> None:
    made = [{"dataset": "cats", "version": "1f", "preset": "digits-flow"}, {"dataset": "dogs", "version": "2f"}]
    events.tell(
        [Event("diffusion.dataset.created", each["dataset"], each, once=each["version"]) for each in made], store
    )


@flow(name="diffusion-pipeline")
def makes_data_and_trains_on_it(store: str) -> None:
    events.tell([Event("diffusion.dataset.created", "birds", {"dataset": "birds", "version": "3f"}, once="3f")], store)


@flow(name="evaluate-model")
def breaks() -> None:
    raise RuntimeError("the cluster burnt down")


@pytest.mark.timeout(900)
def test_a_champion_generates_new_data_trains_and_trouble_calls_the_webhook(
    server: Server, store: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generation, training = generates.to_deployment(name="generate").apply(), trains.to_deployment(name="train").apply()
    assert automations.states() == dict.fromkeys(automations.NAMES)
    with kept_posts() as webhook:
        monkeypatch.setenv("DIFFUSION_WEBHOOK_URL", f"{webhook.url}/{SECRET}")
        with pytest.raises(UserError, match="automation new-data-trains: --preset: say what it starts from"):
            automations.enable("new-data-trains")
        with pytest.raises(UserError, match=r"training\.image.*training\.images"):
            automations.enable("new-data-trains", preset="digits", settings=["training.image=64"])
        with pytest.raises(UserError, match="takes neither --preset nor --set"):
            automations.enable("notify", settings=["training.images=64"])
        longer = ["training.images=64000", "network.channel_multipliers=[1, 2]"]
        automations.enable("new-data-trains", preset="digits", settings=longer)
        for name in ("champion-generates", "notify", "notify", "notify-stuck"):
            automations.enable(name)
        automations.disable("notify-stuck")
        expected = {"new-data-trains": True, "champion-generates": True, "notify": True, "notify-stuck": False}
        assert automations.states() == expected
        assert server.post("automations/count", {}) == 4

        with tags("diffusion"):
            makes_data_and_trains_on_it(store)
            makes_data(store)
            changes_the_champion(store)
            with pytest.raises(RuntimeError):
                breaks()
        wait_for(lambda: len(webhook.received) == 2, "two messages")
        generated, trained = parameters(server, generation, 1), parameters(server, training, 2)
    assert generated == [{"model": "digits/7", "store": store}]
    same = {"store": store, "overrides": "\n".join(longer)}
    assert sorted(trained, key=lambda given: given["name"]) == [
        {"dataset": "cats@1f", "name": "cats", "preset": "digits-flow", **same},
        {"dataset": "dogs@2f", "name": "dogs", "preset": "digits", **same},
    ]
    assert {path for path, _ in webhook.received} == {f"/{SECRET}"}
    texts = sorted(message["text"] for _, message in webhook.received)
    assert texts[0] == "diffusion.gate.refused: digits Worse." and "the cluster burnt down" in texts[1]
    assert SECRET not in "".join(capfd.readouterr()) + json.dumps(server.post("automations/filter", {}))


def parameters(server: Server, deployment: Any, count: int) -> list[dict[str, Any]]:
    """Of the runs that the automations started of a deployment."""
    ours = {"deployments": {"id": {"any_": [str(deployment)]}}}
    runs = wait_for(
        lambda: len(found := server.post("flow_runs/filter", ours)) >= count and found, f"{count} runs of a deployment"
    )
    return [run["parameters"] for run in runs]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with versions 1 to 3 of the model `digits`."""
    store = str(tmp_path_factory.mktemp("store"))
    run_id = tracking.RunRecorder(store, "digits", "run").mlflow_run_id
    defaults = tracking.ServingDefaults(sampler={"steps": 2}, guidance_scale=1, batch_size=4)
    for seed in range(3):
        bundle = tiny_bundle(f"{store}/{seed}", seed=seed)
        tracking.register_version(store, "digits", bundle, run_id, defaults)
    return store


@flow(name="asks", persist_result=False)
def asks(store: str, version: int, seconds: float) -> RegisterResult:
    """A register stage whose gate has only the question: what the gate makes of the answer is its own test."""
    return waiting.decided(lambda: gate(store, version, seconds), lambda result: result.question, store)


def gate(store: str, version: int, seconds: float) -> RegisterResult:
    now = datetime.now(UTC)
    question, answer = approval.ask(
        store,
        Question(
            id=str(version), model="digits", version=version, champion=None, reason="It is within the limit.",
            figures={"candidate": {"recall": 0.5, "recall_error": 0.01}, "floor": {"recall": 0.9}},
            asked_at=now, deadline=now + timedelta(seconds=seconds),
        ),
    )  # fmt: skip
    return RegisterResult(
        seconds=0,
        reused=False,
        model="digits",
        version=version,
        promoted=bool(answer and answer.accepted),
        reason=answer.sentence if answer else "asked",
        figures={},
        question=None if answer else question,
    )


@pytest.mark.timeout(900)
def test_an_answer_from_the_ui_from_a_shell_and_none_also_across_a_restart(
    server: Server, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "POLL_S", 0.5)
    monkeypatch.setattr(waiting, "approval", SimpleNamespace(**{**vars(approval), "answer_of": away_at_first()}))
    with ThreadPoolExecutor(3) as pool, nobody_waits_longer(server):
        # A thread has a context of its own, and which server is meant stands in the context.
        futures = [
            pool.submit(copy_context().run, asks, registry, version, 900 if version < 3 else 90)
            for version in (1, 2, 3)
        ]
        paused = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
        runs = wait_for(lambda: len(found := server.post("flow_runs/filter", paused)) == 3 and found, "three questions")
        of_version = {run["parameters"]["version"]: run["id"] for run in runs}
        reports = server.post("artifacts/filter", {"artifacts": {"key": {"any_": ["approval"]}}})
        assert any("| recall | 0.500 ± 0.010 | – | 0.9 |" in report["data"] for report in reports)
        assert all("data:image/png;base64," in report["data"] for report in reports)

        server.stop()
        answer_by_shell(registry, of_version[2])
        server.start()
        empty = server.post(f"flow_runs/{of_version[1]}/resume", {"run_input": {}})
        assert empty["status"] == "REJECT", "the form is asked for"
        form = {"decision": "accept", "reason": "Both sheets look alike.", "by": "Anna"}
        assert server.post(f"flow_runs/{of_version[1]}/resume", {"run_input": form})["status"] == "ACCEPT"
        results = [future.result(timeout=200) for future in futures]

    assert [result.promoted for result in results] == [True, False, False]
    assert "Accepted by Anna" in results[0].reason and "Both sheets look alike." in results[0].reason
    assert "Refused by Berta" in results[1].reason
    assert "Refused by nobody" in results[2].reason and "It was not answered in" in results[2].reason
    stands = tracking.resolve_model("models:/digits/1", registry).tags
    assert (stands["approval"], stands["approval_by"]) == ("accepted", "Anna")
    states = {
        run["state"]["type"]
        for run in server.post("flow_runs/filter", {"flow_runs": {"id": {"any_": list(of_version.values())}}})
    }
    assert states == {"COMPLETED"}


def away_at_first() -> Callable[[str, Question], Answer | None]:
    """Looks for an answer, of which the first three find the store away."""
    faults = iter([StoreUnavailable("The store was away.")] * 3)

    def answer_of(store: str, question: Question) -> Answer | None:
        if fault := next(faults, None):
            raise fault
        return approval.answer_of(store, question)

    return answer_of


@contextmanager
def nobody_waits_longer(server: Server) -> Iterator[None]:
    """If what is done here fails, the runs that wait for a person end, and their threads with them."""
    try:
        yield
    except BaseException:
        server.start()
        waiting = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PAUSED"]}}}}
        for run in server.post("flow_runs/filter", waiting):
            server.post(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
        raise


def answer_by_shell(store: str, flow_run_id: str) -> None:
    command = ["approve", flow_run_id, "--refuse", "--reason", "Noise.", "--by", "Berta", "--store", store]
    subprocess.run([sys.executable, "-m", "flows.cli", *command], check=True, capture_output=True)
