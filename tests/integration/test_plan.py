"""The plan of a pipeline, against what the same pipeline did and took, and against a store where all of it is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.planning.estimate import RAY_BYTES
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


@pytest.mark.timeout(900)
def test_a_plan_of_an_empty_store_is_what_the_pipeline_does(
    first: Any, first_bytes: dict[str, int], planned: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    plan = planned(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert list(stages) == STAGES and {stage["state"] for stage in stages.values()} == {"will run"}
    images = {name: (stages[name]["images"], first.stages[name].account.images) for name in STAGES}
    assert images == {
        "shard": (1797, 1797),
        "train": (640, 640),
        "evaluate": (32, 32),
        "register": (0, 0),
        "generate": (COUNT, COUNT),
    }
    steps = {name: stages[name]["steps"] for name in ("train", "evaluate", "generate")}
    assert steps == {"train": 640 // 128, "evaluate": 1 * 4, "generate": COUNT // 16 * 4}

    grown = sum(size for folder, size in first_bytes.items() if folder != "mlflow.db")
    assert plan["bytes"] == pytest.approx(grown, rel=0.2)
    assert stages["train"]["bytes"] == pytest.approx(first_bytes["runs"], rel=0.2)
    assert (
        stages["shard"]["bytes"] < 2 * first_bytes["datasets"]
    )  # a small dataset, beside it what is known of its source

    # A worker that has loaded torch holds half a gigabyte, and this network and these images next to nothing.
    workers = {"train": 2, "evaluate": 1, "generate": 1}
    each = {name: (stages[name]["memory_bytes"] - RAY_BYTES) / count for name, count in workers.items()}
    assert all(0.25e9 < memory < 1e9 for memory in each.values()), each
    assert plan["fits"] and plan["memory"].endswith("it fits.") and plan["gpu_hours"] == 0

    # How near the times come is for tests/benchmarks/plan_accuracy.py to judge, on a machine without other work.
    assert all(stage["seconds"] > 0 for stage in stages.values())
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))


def test_a_plan_finds_done_what_is_done(
    first: Any, pipeline_store: str, planned: Callable[[str], dict[str, Any]]
) -> None:
    plan = planned(pipeline_store)
    assert {stage["stage"]: stage["state"] for stage in plan["stages"]} == dict.fromkeys(STAGES, "found done")
    assert plan["trial"] == {} and plan["bytes"] == 0
