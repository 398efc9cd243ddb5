"""The quickest form of each kill that `make chaos` tries in every combination, and times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos import Case, Chaos, Victim, Work, chaos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

QUICKEST = [
    Case(Victim.FLOW, Work.GENERATE, "jobs"),
    Case(Victim.WORKER, Work.GENERATE, "local"),
    Case(Victim.BOTH, Work.TRAIN, "local"),
    Case(Victim.PREFECT, Work.GENERATE, "local"),
    Case(Victim.MLFLOW, Work.TRAIN, "local"),  # a generation has nothing to say to MLflow
    Case(Victim.RAY, Work.GENERATE, "jobs"),
    Case(Victim.STACK, Work.GENERATE, "local"),
]


@pytest.fixture(scope="module")
def stack() -> Iterator[Chaos]:
    with chaos() as stack:
        yield stack


@pytest.mark.parametrize("case", QUICKEST, ids=str)
def test_a_kill_costs_only_time(stack: Chaos, case: Case) -> None:
    outcome = stack.run(case)
    print(outcome)
    assert outcome.wrong == []
