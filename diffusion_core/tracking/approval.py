"""A person's word about a model version: a question in the store, and its one answer.

`<store>/gates/<model>/approvals/<id>/` holds `question.json` and, later, `answer.json`. Both are created if absent: the
first answer stands, whoever gives it and from wherever, and what was answered is not asked again. These records are the
truth; the tags `approval…` of the model version show it in the registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pydantic import AwareDatetime, Field, ValidationError

from diffusion_core.config import Config, UserError, digest, explain
from diffusion_core.store import Directory, layout
from diffusion_core.tracking.registry import tag_version

NOBODY = "nobody"  # who answers when the time is over


class Question(Config):
    """Shall this version become the champion, in place of the one that it was compared with?"""

    id: str = Field(description="Of the two models that are compared: the same comparison is the same question.")
    model: str
    version: int
    champion: int | None = Field(description="The champion that it was compared with; none for a first champion.")
    reason: str = Field(description="One sentence: what the gate found.")
    figures: dict[str, Any] = Field(description="The comparison that the gate made.")
    asked_at: AwareDatetime
    deadline: AwareDatetime = Field(description="From then on no answer is a refusal.")

    @property
    def reference(self) -> str:
        """The version in one word, as `digits/3`."""
        return f"{self.model}/{self.version}"


class Answer(Config):
    """What was said, by whom, why and when."""

    accepted: bool
    by: str = Field(min_length=1, max_length=200)
    reason: str = Field(min_length=1, max_length=1000)
    at: AwareDatetime

    @property
    def word(self) -> str:
        return "accepted" if self.accepted else "refused"

    @property
    def sentence(self) -> str:
        return f"{self.word.capitalize()} by {self.by} at {self.at:%Y-%m-%d %H:%M} UTC: {self.reason}"


def question_id(version: int, candidate_digest: str, champion_digest: str) -> str:
    """The id of a question, of the version's number and the digests of the bundles compared ("": no champion yet)."""
    return f"{version}-{digest(candidate_digest, champion_digest)}"


def ask(store: str, question: Question) -> tuple[Question, Answer | None]:
    """Ask, unless it was asked before; the question as it stands, and its answer if there is one."""
    place = _place(store, question)
    place.create_json(layout.QUESTION, question.model_dump(mode="json"))
    asked = _read_question(place)
    return asked, answer_of(store, asked)


def answer_of(store: str, question: Question) -> Answer | None:
    """The answer, which after the deadline is a refusal; None while there is time."""
    place = _place(store, question)
    if (answer := _read_answer(place)) is None and datetime.now(UTC) >= question.deadline:
        hours = (question.deadline - question.asked_at).total_seconds() / 3600
        silence = Answer(accepted=False, by=NOBODY, reason=f"It was not answered in {hours:g} h.", at=question.deadline)
        answer = _create(place, silence)
    return answer


def answer(store: str, question: Question, accepted: bool, by: str, reason: str) -> Answer:
    """Answer a question, in the store and in the registry.

    Raises:
        UserError: it is answered already, or `by` or `reason` is empty or too long.
    """
    if earlier := answer_of(store, question):
        raise UserError(
            f"{question.reference} is answered already. {earlier.sentence} What `diffusion promote` says counts "
            "whatever was answered."
        )
    try:
        said = Answer(accepted=accepted, by=by.strip(), reason=reason.strip(), at=datetime.now(UTC))
    except ValidationError as error:
        raise UserError(explain(error)) from None
    stands = _create(_place(store, question), said)
    show(store, question, stands)
    return stands


def answer_by_promotion(store: str, model: str, version: int) -> None:
    """Answer what is still asked about a version that somebody made the champion without answering."""
    for _, question in _questions(store):
        if (question.model, question.version) == (model, version) and answer_of(store, question) is None:
            answer(store, question, True, "diffusion promote", "It was made the champion whatever is answered.")


def show(store: str, question: Question, answer: Answer | None) -> None:
    """Show in the registry, as tags of the version, how a question stands."""
    tags = {
        "approval": answer.word if answer else f"asked until {question.deadline:%Y-%m-%d %H:%M} UTC",
        "approval_by": answer.by if answer else "",
        "approval_at": answer.at.isoformat(timespec="seconds") if answer else "",
        "approval_reason": answer.reason if answer else "",
    }
    tag_version(store, question.model, question.version, tags)


def waits(store: str, question: Question, flow_run_id: str) -> None:
    """Write down that a Prefect flow run waits for the answer, so that a person can name that run instead."""
    _place(store, question).create_json(layout.waiting(flow_run_id), {"flow_run_id": flow_run_id})


def open_question(store: str, reference: str) -> Question:
    """The unanswered question about `name/version` or `models:/name/version`, or of a waiting flow run.

    Raises:
        UserError: there is no such question; says which there are, or how it was answered.
    """
    wanted = reference.removeprefix("models:/")
    asked = sorted(_questions(store), key=lambda found: found[1].asked_at)
    named = [
        question for place, question in asked if wanted == question.reference or place.exists(layout.waiting(wanted))
    ]
    unanswered = [question for question in named if answer_of(store, question) is None]
    if unanswered:
        return unanswered[-1]
    if named:
        raise UserError(f"{reference} is answered already. {_sentence(store, named[-1])}")
    still = ", ".join(question.reference for _, question in asked if answer_of(store, question) is None) or "none"
    raise UserError(f"{reference}: nothing is asked about it; unanswered in the store {store}: {still}.")


def _sentence(store: str, question: Question) -> str:
    answer = answer_of(store, question)
    return answer.sentence if answer else ""


def _questions(store: str) -> Iterator[tuple[Directory, Question]]:
    root = Directory(store)
    for model in (root / layout.GATES).children():
        approvals = root / layout.approvals(model)
        for name in approvals.children():
            place = approvals / name
            if place.exists(layout.QUESTION):
                yield place, _read_question(place)


def _place(store: str, question: Question) -> Directory:
    return Directory(store) / f"{layout.approvals(question.model)}/{question.id}"


def _read_question(place: Directory) -> Question:
    return Question.model_validate(place.read_json(layout.QUESTION))


def _read_answer(place: Directory) -> Answer | None:
    try:
        return Answer.model_validate(place.read_json(layout.ANSWER))
    except FileNotFoundError:
        return None


def _create(place: Directory, said: Answer) -> Answer:
    """The answer that stands: this one, or one that came before it."""
    place.create_json(layout.ANSWER, said.model_dump(mode="json"))
    return Answer.model_validate(place.read_json(layout.ANSWER))
