"""A flow that waits for a person's word about a model version, with Prefect's pause and its form in the UI.

Whoever answers first decides: the form of the paused run, or `diffusion approve` from any shell that reaches the store.
The answer's home is the store (`diffusion_core.tracking.approval`); the pause shows the question, and ends with it. The
wait outlives the Prefect server and the store: what fails is tried again until the question is answered or its time is
over.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast
from uuid import UUID, uuid4

import httpx
from prefect import get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.input import RunInput, keyset_from_paused_state
from prefect.input.run_input import Keyset
from prefect.states import Paused
from pydantic import Field, ValidationError

from diffusion_core.config import UserError
from diffusion_core.jobs.request import Result
from diffusion_core.stages.evaluate import amount
from diffusion_core.store.patience import StoreUnavailable
from diffusion_core.tracking import approval
from diffusion_core.tracking.approval import Answer, Question
from flows import artifacts
from flows.display import current_display
from flows.results import columns, markdown

ResultT = TypeVar("ResultT", bound=Result)

POLL_S = 5.0
_MARGIN = timedelta(days=30)  # Prefect fails a pause that is over; ours is over first, and ends in good order


class Decision(RunInput):
    """The form of the paused run."""

    decision: Literal["accept", "refuse"] = Field(description="Shall the version become the champion?")
    reason: str = Field(min_length=1, max_length=1000, description="Why; it stands in the registry.")
    by: str = Field(min_length=1, max_length=200, title="Your name", description="Who says so.")


def decided(work: Callable[[], ResultT], question: Callable[[ResultT], Question | None], store: str) -> ResultT:
    """The result of some work, done again after each question of its result to a person: it finds the answer."""
    while (asked := question(result := work())) is not None:
        _tell(asked, store)
        answer = _Wait(asked, store).answer()
        current_display().say(f"{asked.reference}: {answer.sentence}")
        get_run_logger().info("%s: %s", asked.reference, answer.sentence)
    return result


class _Wait:
    """The wait of this flow run for one answer. Each look at the run's state does what is next, whatever was before."""

    def __init__(self, question: Question, store: str) -> None:
        self._question, self._store = question, store
        self._run = UUID(runtime.flow_run.id)
        self._keys: Keyset | None = None
        approval.waits(store, question, str(self._run))

    def answer(self) -> Answer:
        """The answer, with the flow run running again."""
        while True:
            try:
                answer = approval.answer_of(self._store, self._question)
                with get_client(sync_client=True) as client:
                    state = client.read_flow_run(self._run).state
                    if (done := self._step(client, state, answer)) is not None:
                        return done
            except (httpx.HTTPError, StoreUnavailable) as error:
                get_run_logger().warning("Prefect or the store does not answer, the wait goes on: %r", error)
            time.sleep(POLL_S)

    def _step(self, client: SyncPrefectClient, state: State | None, answer: Answer | None) -> Answer | None:
        if state is not None and state.is_paused():
            if answer is not None:
                client.resume_flow_run(self._run, _as_form(answer))
            return None
        if state is None or not state.is_running():
            raise UserError(
                f"The run was ended while it waited for an answer about {self._question.reference}; "
                "the same command waits on."
            )
        answer = answer or self._from_the_form()
        if answer is None:
            self._pause(client)
        return answer

    def _pause(self, client: SyncPrefectClient) -> None:
        paused: State[Any] = Paused(
            pause_expiration_time=self._question.deadline + _MARGIN, pause_key=f"approval-{uuid4()}"
        )
        self._keys = keyset_from_paused_state(paused)
        paused.state_details.run_input_keyset = cast(dict[str, str], self._keys)
        Decision.with_initial_data(description=_description(self._question)).save(self._keys, self._run)
        client.set_flow_run_state(self._run, paused)

    def _from_the_form(self) -> Answer | None:
        """The answer that a person gave in the UI, which is then written down; None if nobody did."""
        if self._keys is None:
            return None
        try:
            said = cast(Decision, Decision.load(self._keys, self._run))
        except ValidationError:  # resumed by force, without an answer
            return None
        try:
            return approval.answer(self._store, self._question, said.decision == "accept", said.by, said.reason)
        except UserError as error:  # somebody else was first
            get_run_logger().warning(str(error))
            return approval.answer_of(self._store, self._question)


def _as_form(answer: Answer) -> dict[str, str]:
    return {"decision": "accept" if answer.accepted else "refuse", "reason": answer.reason, "by": answer.by}


def _tell(question: Question, store: str) -> None:
    """Say at the terminal, in the log and in an artifact what is asked and how it is answered."""
    command = shlex.join(["diffusion", "approve", question.reference, "--accept", "--reason", "…", "--store", store])
    until = f"{question.deadline:%Y-%m-%d %H:%M} UTC"
    sentence = (
        f"{question.reference} waits for a person until {until}, then it is refused. Answer in the Prefect UI "
        f"(Resume), or with\n  {command}\n(or --refuse)."
    )
    current_display().say(sentence)
    get_run_logger().info(sentence)
    create_markdown_artifact(_report(question, store, command), key="approval", description=_description(question))


def _description(question: Question) -> str:
    against = f" in place of version {question.champion}" if question.champion else ", the first one"
    return f"Shall {question.reference} become the champion{against}? {question.reason}"


def _report(question: Question, store: str, command: str) -> str:
    """The figures beside champion and floor, both sample sheets, and how to answer."""
    version = f"version {question.version}"
    champion = f"champion (version {question.champion})" if question.champion else "champion (none)"
    titles = {version: "candidate", champion: "champion", "held-out real images (floor)": "floor"}
    figures = {title: question.figures.get(name, {}) for title, name in titles.items()}
    rows = [
        {"figure": name, **{title: amount(of, name) if name in of else "–" for title, of in figures.items()}}
        for name in figures[version]
        if not name.endswith("_error")
    ]
    sheets = {version: artifacts.samples_of(question.model, question.version, store)}
    if question.champion is not None:
        sheets[champion] = artifacts.samples_of(question.model, question.champion, store)
    answer = f"Answer with *Resume* at the top of the run's page, or with\n\n    {command}\n\n(or `--refuse`)."
    return markdown(_description(question), columns(rows), answer, columns([sheets]))
