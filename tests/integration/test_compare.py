"""The comparison of samplers as it is run: as a job with real Ray workers, and by the command through its flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.evaluation.config import ClassifierConfig, ComparisonConfig, EvaluationConfig
from diffusion_core.jobs.backend import BackendConfig, run_job
from diffusion_core.progress import ProgressEvent
from diffusion_core.stages.compare import CompareRequest, CompareResult
from diffusion_core.store import Directory
from tests.evaluated import pictures_dataset
from tests.tiny_bundle import tiny_bundle

CLASSIFIER = {"width": 8, "features": 16, "images": 500, "batch_size": 32}
CONTESTANTS = ["ddpm:6", "heun:2@2"]
COMPARED = {"contestants": CONTESTANTS, "candidate": "heun:2@2", "seeds": 2, "images": 32, "batch_size": 16}


@pytest.fixture(scope="module")
def place(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    store = str(tmp_path_factory.mktemp("store"))
    dataset = pictures_dataset(store)
    return store, dataset.uri, tiny_bundle(Path(store, "bundle"), dataset.class_names, dataset.image_shape)


@pytest.fixture(scope="module")
def compared(place: tuple[str, str, str]) -> tuple[CompareResult, list[ProgressEvent]]:
    store, dataset_uri, bundle_uri = place
    request = CompareRequest(
        store=store,
        bundle_uri=bundle_uri,
        dataset_uri=dataset_uri,
        evaluation=EvaluationConfig(classifier=ClassifierConfig(**CLASSIFIER)),
        comparison=ComparisonConfig.model_validate(COMPARED),
    )
    events: list[ProgressEvent] = []
    return run_job("compare", request, CompareResult, BackendConfig(), on_progress=events.append), events


def test_the_job_makes_table_plot_and_report(compared: tuple[CompareResult, list[ProgressEvent]]) -> None:
    result, events = compared
    assert (result.cells, result.made, result.reused) == (4, 4, False)
    assert [each.evaluations for each in result.comparison.standings] == [6, 6]
    assert result.comparison.verdict and result.comparison.verdict.candidate == "heun:2@2"
    last = [event for event in events if event.stage == "compare"][-1]
    assert last.done == last.total == 2 * 32 * (6 + 6)
    assert json.loads(Path(result.uri).read_text()) == result.comparison.model_dump(mode="json")
    assert "| ddpm:6 " in Path(result.table).read_text()
    assert Path(result.picture).read_bytes().startswith(b"\x89PNG")


def test_the_command_adds_a_seed(
    place: tuple[str, str, str],
    compared: tuple[CompareResult, Any],
    prefect_server: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the flow, whose artifact embeds the plot; the two seeds of each contestant are found."""
    from flows.cli import main

    store, dataset_uri, bundle_uri = place
    settings = [f"evaluation.classifier={json.dumps(CLASSIFIER)}", "comparison.batch_size=16"]
    typed = ["compare-samplers", "--model", bundle_uri, "--dataset", dataset_uri, "--store", store, "--seeds", "3"]
    typed += ["--images", "32", "--candidate", CONTESTANTS[1]]
    typed += [word for name in CONTESTANTS for word in ("--sampler", name)]
    typed += [word for setting in settings for word in ("--set", setting)]
    assert main(typed) == 0
    told = capsys.readouterr().out
    assert "| **heun:2@2** " in told and "held-out real images (N = 32)" in told and "ratio to ddpm:6" in told
    assert "6, 2 new" in told and "3 seeds" in told and "upper 95 % bound" in told
    first = Directory(compared[0].uri.partition("/views/")[0])
    assert len(list(first.list("cells/"))) == 6
