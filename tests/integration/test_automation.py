"""What follows from an event, and what a person is asked: with a real Prefect server, which is also started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow, tags
from prefect.settings import PREFECT_API_URL, temporary_settings

from diffusion_core import tracking
from diffusion_core.stages.events import Event
from diffusion_core.stages.register import RegisterResult
from diffusion_core.tracking import approval
from diffusion_core.tracking.approval import Question
from flows import approval as waiting
from flows import automations, events
from tests.local_stack import free_port, wait_for
from tests.tiny_bundle import tiny_bundle

SECRET = "t0ken-in-the-address"


class Server:
    """A Prefect server on a database of its own that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.url = f"http://127.0.0.1:{self._port}/api"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
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
    server.start()
    try:
        with temporary_settings({PREFECT_API_URL: server.url}):
            yield server
    finally:
        server.stop()


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on loopback that keeps what is posted to it: its address, with a secret in it, and the messages."""
    received: list[dict[str, Any]] = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/{SECRET}"
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Keep) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/{SECRET}", received
        http.shutdown()


@flow(name="generate-images")
def generate_images(request: dict[str, str]) -> None:
    return


@flow(name="register-model")
def changes_the_champion(store: str) -> None:
    champion = Event("diffusion.champion.changed", "digits", {"model": "digits", "version": 7}, once="digits/7")
    events.tell([champion, champion, Event("diffusion.gate.refused", "digits", {"reason": "Worse."})], store)


@flow(name="train-model")
def breaks() -> None:
    raise RuntimeError("the cluster burnt down")


@pytest.mark.timeout(300)
def test_a_champion_generates_and_trouble_calls_the_webhook(
    server: Server, store: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    deployment = generate_images.to_deployment(name="generate-images").apply()
    assert automations.states() == dict.fromkeys(automations.NAMES)
    with webhook() as (address, received):
        monkeypatch.setenv("DIFFUSION_WEBHOOK_URL", address)
        for name in ("champion-generates", "notify", "notify", "notify-stuck"):
            automations.enable(name)
        automations.disable("notify-stuck")
        expected = {"new-data-trains": None, "champion-generates": True, "notify": True, "notify-stuck": False}
        assert automations.states() == expected
        assert server.post("automations/count", {}) == 3

        with tags("diffusion"):
            changes_the_champion(store)
            with pytest.raises(RuntimeError):
                breaks()
        ours = {"deployments": {"id": {"any_": [str(deployment)]}}}
        runs = wait_for(lambda: server.post("flow_runs/filter", ours), "a run of the deployment")
        wait_for(lambda: len(received) == 2, "two messages")
    assert [run["parameters"] for run in runs] == [{"request": {"model": "models:/digits/7", "store": store}}]
    texts = sorted(message["text"] for message in received)
    assert texts[0] == "diffusion.gate.refused: digits Worse." and "the cluster burnt down" in texts[1]
    assert SECRET not in "".join(capfd.readouterr()) + json.dumps(server.post("automations/filter", {}))


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


@pytest.mark.timeout(300)
def test_an_answer_from_the_ui_from_a_shell_and_none_also_across_a_restart(
    server: Server, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "POLL_S", 0.5)
    with ThreadPoolExecutor(3) as pool:
        # A thread has a context of its own, and which server is meant stands in the context.
        futures = [
            pool.submit(copy_context().run, asks, registry, version, 150 if version < 3 else 25)
            for version in (1, 2, 3)
        ]
        paused = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
        runs = wait_for(lambda: len(found := server.post("flow_runs/filter", paused)) == 3 and found, "three questions")
        of_version = {run["parameters"]["version"]: run["id"] for run in runs}
        reports = server.post("artifacts/filter", {"artifacts": {"key": {"any_": ["approval"]}}})
        assert any("| recall | 0.5 ± 0.01 | – | 0.9 |" in report["data"] for report in reports)
        assert all("data:image/png;base64," in report["data"] for report in reports)

        server.stop()
        answer_by_shell(registry, of_version[2])
        server.start()
        empty = server.post(f"flow_runs/{of_version[1]}/resume", {"run_input": {}})
        assert empty["status"] == "REJECT", "the form is asked for"
        form = {"decision": "accept", "reason": "Both sheets look alike.", "by": "Anna"}
        assert server.post(f"flow_runs/{of_version[1]}/resume", {"run_input": form})["status"] == "ACCEPT"
        results = [future.result(timeout=120) for future in futures]

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


def answer_by_shell(store: str, flow_run_id: str) -> None:
    command = ["approve", flow_run_id, "--refuse", "--reason", "Noise.", "--by", "Berta", "--store", store]
    subprocess.run([sys.executable, "-m", "flows.cli", *command], check=True, capture_output=True)
