"""Questions to a person and their answers: records of the store, shown in a real MLflow registry."""

from datetime import UTC, datetime, timedelta

import pytest

from diffusion_core import tracking
from diffusion_core.config import UserError
from diffusion_core.tracking import approval
from diffusion_core.tracking.approval import Question
from flows.cli import main
from tests.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A store with one version of the model `digits`."""
    store = str(tmp_path_factory.mktemp("store"))
    bundle = tiny_bundle(f"{store}/bundle", ("upper", "left"), (8, 8, 1))
    run_id = tracking.RunRecorder(store, "digits", "run").mlflow_run_id
    defaults = tracking.ServingDefaults(sampler={"steps": 2}, guidance_scale=1, batch_size=4)
    tracking.register_version(store, "digits", bundle, run_id, defaults)
    return store


def asked(store, name, hours=1.0, ago=0.0):
    """A question that was asked `ago` hours ago and may be answered for `hours`."""
    at = datetime.now(UTC) - timedelta(hours=ago)
    question = Question(
        id=name, model="digits", version=1, champion=None, reason="It is within the limit.", figures={},
        asked_at=at, deadline=at + timedelta(hours=hours),
    )  # fmt: skip
    return approval.ask(store, question)


def tags(store):
    found = tracking.resolve_model("models:/digits/1", store).tags
    return {name: value for name, value in found.items() if name.startswith("approval")}


def test_the_first_answer_stands_and_is_shown_in_the_registry(registry):
    question, answer = asked(registry, "first")
    assert answer is None
    approval.show(registry, question, answer)
    assert tags(registry)["approval"].startswith("asked until ")
    given = approval.answer(registry, question, True, " Anna ", "Both sheets look alike.")
    with pytest.raises(
        UserError, match=r"digits/1 is answered already. Accepted by Anna at .*: Both sheets look alike"
    ):
        approval.answer(registry, question, False, "Berta", "No.")
    assert asked(registry, "first", hours=9) == (question, given), "what was answered is not asked again"
    assert tags(registry) == {
        "approval": "accepted",
        "approval_by": "Anna",
        "approval_at": given.at.isoformat(timespec="seconds"),
        "approval_reason": "Both sheets look alike.",
    }


def test_silence_is_a_refusal_from_the_deadline_on(registry):
    question, answer = asked(registry, "silence", hours=2, ago=2.5)
    assert not answer.accepted and answer.sentence.endswith("It was not answered in 2 h.")
    assert answer.at == question.deadline
    with pytest.raises(UserError, match=r"answered already\. Refused by nobody"):
        approval.answer(registry, question, True, "Anna", "Too late.")


@pytest.mark.parametrize(("by", "reason", "field"), [(" ", "Good.", "by"), ("Anna", "", "reason")])
def test_who_and_why_have_to_be_said(registry, by, reason, field):
    question, _ = asked(registry, f"empty-{field}")
    with pytest.raises(UserError, match=f"{field}: '' is not accepted"):
        approval.answer(registry, question, True, by, reason)
    assert approval.answer_of(registry, question) is None


def test_a_question_is_found_by_its_version_or_by_the_flow_run_that_waits(tmp_path):
    store = str(tmp_path)
    with pytest.raises(UserError, match=r"digits/1: nothing is asked about it; unanswered in the store \S+: none"):
        approval.open_question(store, "digits/1")
    question, _ = asked(store, "a")
    approval.waits(store, question, "0b5d")
    for reference in ("digits/1", "models:/digits/1", "0b5d"):
        assert approval.open_question(store, reference) == question
    with pytest.raises(UserError, match=r"digits/2: nothing is asked about it; unanswered in the store .*: digits/1"):
        approval.open_question(store, "digits/2")


def test_the_same_comparison_is_the_same_question():
    same = approval.question_id(3, "aa", "bb")
    assert same == approval.question_id(3, "aa", "bb") and same.startswith("3-")
    assert len({same, approval.question_id(3, "aa", ""), approval.question_id(3, "cc", "bb")}) == 3


def test_a_promotion_by_hand_is_the_answer_to_what_is_asked_about_the_version(registry):
    question, _ = asked(registry, "promoted")
    assert main(["promote", "digits", "1", "--store", registry]) == 0
    given = approval.answer_of(registry, question)
    assert given.accepted and given.by == "diffusion promote"
    assert main(["promote", "digits", "1", "--store", registry]) == 0, "an answer that is there is left alone"
