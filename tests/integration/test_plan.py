"""The plan of a pipeline, against what the same pipeline took, and against a store where all of it is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_pipeline import COUNT, SETTINGS

OPTIONS = ["--preset", "digits", *(word for setting in SETTINGS for word in ("--set", setting))]
STAGES = ["shard", "train", "evaluate", "register", "generate"]


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Callable[[str], dict[str, Any]]:
    from flows.cli import main

    def ask(store: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["plan", *OPTIONS, "--store", store, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return ask


@pytest.mark.timeout(400)
def test_a_plan_of_an_empty_store_is_about_what_the_pipeline_takes(
    first: Any, planned: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Within a generous bound: other tests share the machine, and the pipeline has found a Ray that runs already."""
    plan = planned(str(tmp_path))
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert list(stages) == STAGES and {stage["state"] for stage in stages.values()} == {"will run"}
    images = {name: (stages[name]["images"], first.stages[name].account.images) for name in STAGES}
    assert images["shard"] == (1797, 1797) and images["train"] == (640, 640) and images["generate"] == (COUNT, COUNT)
    taken = sum(stage.account.seconds for stage in first.stages.values())
    assert taken / 6 < plan["seconds"] < 6 * taken, (plan["seconds"], taken)
    assert plan["fits"] and stages["train"]["bytes"] > 0 and plan["gpu_hours"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]


def test_a_plan_finds_done_what_is_done(
    first: Any, pipeline_store: str, planned: Callable[[str], dict[str, Any]]
) -> None:
    plan = planned(pipeline_store)
    assert {stage["stage"]: stage["state"] for stage in plan["stages"]} == dict.fromkeys(STAGES, "found done")
    assert plan["trial"] == {} and plan["bytes"] == 0
