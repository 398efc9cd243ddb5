"""The whole pipeline as the real Prefect flow, tiny: every stage's result, then again with everything found done."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_core.config import UserError
from diffusion_core.jobs.backend import BackendConfig
from diffusion_core.stages.settings import load_config
from diffusion_core.store import Directory
from diffusion_core.store.layout import CHECKPOINT
from flows.artifacts import MAX_PICTURE_BYTES
from tests.tiny_pipeline import COUNT, SETTINGS


@pytest.fixture(scope="module")
def store(pipeline_store: str) -> str:
    return pipeline_store


@pytest.mark.timeout(900)
def test_every_stage_has_its_result(first: Any, store: str) -> None:
    assert not any(result.reused for result in first.stages.values())
    assert sum(first.dataset.splits.values()) == 1797 and first.dataset.rejected == 0
    assert first.run.images_seen == 640 and np.isfinite(first.run.loss)
    assert set(first.evaluation.floor) <= set(first.evaluation.figures)
    assert all(np.isfinite(value) for value in first.evaluation.figures.values())
    assert (first.version.model, first.version.version, first.version.promoted) == ("digits", 1, True)
    assert (first.images.images, first.images.generated, first.images.first_image_id) == (COUNT, COUNT, 0)
    assert first.images.model_version == "digits/1"
    assert Path(first.images.contact_sheet).read_bytes().startswith(b"\x89PNG")


def test_prefect_shows_it(first: Any) -> None:
    artifacts = _artifacts()
    assert {"dataset", "run", "evaluation", "model-version", "image-set", "pipeline"} <= set(artifacts)
    assert any(key.endswith("-progress") for key in artifacts)
    sheet = artifacts["image-set"].partition("data:image/png;base64,")[2].partition(")")[0]
    with Image.open(io.BytesIO(base64.b64decode(sheet))) as picture:
        assert picture.size[0] > 8
    report, _, rest = artifacts["pipeline"].partition("### Training loss")
    pictures = re.findall(r"data:image/png;base64,([^)]+)", artifacts["pipeline"])
    assert len(pictures) == 3 and all(len(picture) < MAX_PICTURE_BYTES for picture in pictures)
    assert "### Generated images" in report and "version 1, champion" in report and "What changed" not in report
    for stage, result in first.stages.items():
        assert f"| {stage} |" in rest and f"{result.job}/log.txt" in rest
    assert f"runs:/{first.run.mlflow_run_id}" in rest and "models:/digits/1" in rest
    figures = json.loads(artifacts["evaluation"])
    assert {row["figure"] for row in figures} == set(first.evaluation.figures)
    assert any(row["held-out real images (floor)"] is not None for row in figures)


def test_mlflow_names_the_flow_run_and_keeps_no_figure_for_itself(first: Any, store: str) -> None:
    from prefect.client.orchestration import get_client

    from diffusion_core.tracking import connection, resolve_model

    with get_client(sync_client=True) as client:
        names = {str(run.id): run.name for run in client.read_flow_runs()}
    recorded = connection.client(store).get_run(first.run.mlflow_run_id)
    for tags in (recorded.data.tags, resolve_model("models:/digits/1", store).tags):
        assert tags["prefect.flow_run_name"] == names[tags["prefect.flow_run_id"]]
        assert tags["prefect.flow_run_url"].endswith(f"/runs/flow-run/{tags['prefect.flow_run_id']}")
    kept = Directory(first.run.run_uri).read("metrics.jsonl").decode().splitlines()
    assert json.loads(kept[-1])["loss"] == recorded.data.metrics["loss"] == first.run.loss


@pytest.mark.timeout(900)
def test_again_finds_everything_done(first: Any, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    options = [part for setting in SETTINGS for part in ("--set", setting)]
    assert main(["pipeline", "--preset", "digits", "--store", store, *options, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for stage, result in (("dataset", first.dataset), ("run", first.run), ("version", first.version)):
        assert again[stage]["reused"]
        for field, value in result.model_dump(mode="json").items():
            if field not in ("seconds", "reused", "reason", "figures", "images_per_second", "job", "account"):
                assert again[stage][field] == value, (stage, field)
    assert again["news"].startswith("Nothing changed since ") and again["changes"] == {}
    assert again["evaluation"]["figures"] == first.evaluation.figures
    assert again["images"]["uri"] == first.images.uri and again["images"]["generated"] == 0


def test_a_picture_answers_for_itself(first: Any, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    assert main(["lineage", first.images.set_id, "--image", "17", "--store", store, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)
    chain = ["image", "shard", "image set", "model version", "bundle", "run", "dataset version", "source"]
    assert [step["what"] for step in steps] == chain
    by_name = {step["what"]: step for step in steps}
    assert by_name["model version"]["id"] == "digits/1"
    assert by_name["run"]["id"] == first.run.run_id and by_name["run"]["code_version"]
    assert by_name["dataset version"]["id"] == first.dataset.version
    assert by_name["source"]["id"] == "digits"
    for reference, start in (
        ("digits@champion", "model version"),
        (f"digits@{first.dataset.version[:6]}", "dataset version"),
        (first.run.run_id, "bundle"),
        (first.dataset.uri, "dataset version"),
    ):
        assert main(["lineage", reference, "--store", store, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["what"] == start


def test_pictures_are_made_again_with_the_same_bytes(
    first: Any, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main

    assert main(["reproduce", first.images.uri, "--image", "3", "--image", "31", "--store", store, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["image_id"], row["same"]) for row in rows] == [(3, True), (31, True)]


def test_verify_notices_a_changed_byte(first: Any, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    for reference in (first.images.set_id, first.dataset.uri, first.run.bundle_uri, "models:/digits/1"):
        assert main(["verify", reference, "--store", store]) == 0
    shard = next(Path(first.images.uri).glob("shards/*.parquet"))
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
        capsys.readouterr()
        assert main(["verify", first.images.set_id, "--store", store, "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["problems"]
    finally:
        shard.write_bytes(whole)


def test_the_store_lists_what_it_has(first: Any, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    found = {}
    for kind in ("models", "datasets", "imagesets", "runs"):
        assert main(["list", kind, "--store", store, "--json"]) == 0
        found[kind] = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["models"]] == ["models:/digits/1"]
    assert "champion" in found["models"][0]["aliases"]
    assert [row["uri"] for row in found["datasets"]] == [first.dataset.uri]
    assert {(row["set"], row["images"]) for row in found["imagesets"] if row["for"] == "use"} == {
        (first.images.set_id, COUNT)
    }
    assert [row["images"] for row in found["imagesets"] if row["for"] == "evaluation"] == [32]
    assert first.run.run_id in [row["run"] for row in found["runs"]]
    assert main(["prune", "--unused", "--older-than", "0s", "--store", store, "--json"]) == 0
    going = {candidate["kind"] for candidate in json.loads(capsys.readouterr().out)["candidates"]}
    assert "job" in going and going <= {"job", "lease"}


def test_a_users_mistake_is_not_tried_again(prefect_server: None, store: str, tmp_path: Path) -> None:
    """What only the job finds to be wrong fails the flow at once, with the job's sentence."""
    from diffusion_core.stages.shard import ShardRequest
    from flows.stages import FLOWS

    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    config = load_config(
        shortcuts={"name": "broken", "source.uri": str(tmp_path), "dataset.image_size": 8, "store": store}
    )
    with pytest.raises(UserError, match="reject") as mistake:
        FLOWS["shard"](ShardRequest.of(config), config.backend)
    run, errors = _told_of_the_last_run()
    assert run.state.is_failed() and run.state.message == str(mistake.value)
    assert errors == [f"Finished in state Failed({str(mistake.value)!r})"]  # of the task
    jobs = Directory(store) / "jobs"
    requests = [(jobs / name).read_json("request.json") for name in jobs.children() if name.startswith("shard-")]
    assert [request["dataset"]["name"] for request in requests].count("broken") == 1


def test_a_mistake_in_a_form_is_one_sentence(prefect_server: None, store: str) -> None:
    """As a worker runs it: the engine in a process of its own, which would log the traceback a third time."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from flows.schedules.runs import pipeline

    with get_client(sync_client=True) as client:
        asked = {"store": store, "preset": "digits", "overrides": "training.batch_sise: 256"}
        deployment = client.create_deployment(
            client.create_flow(pipeline), "wrong", entrypoint="flows.schedules.runs.pipeline", parameters=asked
        )
        run = client.create_flow_run_from_deployment(deployment)
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    subprocess.run([sys.executable, "-m", "prefect.engine", str(run.id)], env=environment, capture_output=True)
    run, errors = _told_of_the_last_run()
    said = "overrides training.batch_sise: there is no such field, did you mean training.batch_size"
    assert run.state.is_failed() and run.state.message.startswith(said) and "\n" not in run.state.message
    assert errors == [run.state.message]


def test_a_form_of_every_field_says_which_is_wrong(prefect_server: None, store: str) -> None:
    from flows.pipeline import diffusion_pipeline

    config = load_config("digits", shortcuts={"store": store}).model_dump(mode="json")
    with pytest.raises(UserError) as mistake:
        diffusion_pipeline({**config, "dataset": {**config["dataset"], "test_fraction": 2}})
    run, errors = _told_of_the_last_run()
    assert run.state.message.startswith("config.dataset.test_fraction: 2 is not accepted: ")
    assert errors == [run.state.message] == [str(mistake.value)]


def test_a_fault_keeps_one_traceback(prefect_server: None, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_core.jobs.transport import JobFailed
    from diffusion_core.stages.shard import ShardRequest
    from flows import stages

    def broken(*_: Any) -> None:
        raise JobFailed("The job broke.")

    monkeypatch.setattr(stages, "follow_job", broken)
    request = ShardRequest.of(load_config("digits", shortcuts={"store": store}))
    with pytest.raises(JobFailed):
        stages.FLOWS["shard"](request, BackendConfig(retries=1, retry_delay_s=0))
    run, errors = _told_of_the_last_run(tracebacks=1)
    assert run.state.is_failed() and any("in broken" in error for error in errors)


def _told_of_the_last_run(tracebacks: int = 0) -> tuple[Any, list[str]]:
    """The flow run that began last, and what its log has of errors, with so many tracebacks."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter
    from prefect.client.schemas.sorting import FlowRunSort, LogSort

    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
        wanted = LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        deadline, log = time.monotonic() + 20, []
        while not [line for line in log if line.task_run_id is None and "Finished in state" in line.message]:
            assert time.monotonic() < deadline, [line.message for line in log]
            time.sleep(0.2)  # a thread of the flow's process sends them
            log = client.read_logs(wanted, sort=LogSort.TIMESTAMP_ASC)
    assert sum("Traceback" in line.message for line in log) == tracebacks
    return run, [line.message for line in log if line.level >= 40]


def _artifacts() -> dict[str, str]:
    """The newest artifact of each key."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    return {
        artifact.key: str(artifact.data) for artifact in sorted(found, key=lambda item: item.created) if artifact.key
    }


@pytest.mark.timeout(900)
def test_ctrl_c_ends_the_job_and_the_same_command_goes_on(first: Any, store: str) -> None:
    """A training that would take hours is interrupted after a checkpoint; with fewer images it ends from there."""
    from prefect.settings import PREFECT_API_URL

    settings = [*SETTINGS, "training.seed=5", "training.checkpoint_every_images=128"]
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "flows.cli", "train", "-p", "digits", "--store", store, *options]
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    runs = set((Directory(store) / "runs").children())

    process = subprocess.Popen([*command, "--images", "10000000"], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (progress := _checkpoints(store, runs)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, news = process.communicate(timeout=60)
    finally:
        process.terminate()  # whatever failed, the job must not hold the cluster that the other tests need
        process.wait()
    assert process.returncode == 130
    assert news.rstrip().endswith("Interrupted; the same command continues the work.")
    assert "Traceback" not in news
    jobs = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"{store}/jobs/" not in jobs

    reached = max(_checkpoints(store, runs))
    assert reached >= max(progress)
    goal = reached + 256
    done = subprocess.run(
        [*command, "--images", str(goal), "--json"], env=environment, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert set((Directory(store) / "runs").children()) - runs == {result["run_id"]}
    assert goal <= result["images_seen"] < goal + 128
    assert not result["reused"]


def _checkpoints(store: str, besides: set[str]) -> list[int]:
    """Images seen of the complete checkpoints of new runs."""
    found = []
    for entry in (Directory(store) / "runs").list():
        run, _, rest = entry.key.partition("/")
        if run not in besides and rest.startswith("checkpoints/") and rest.endswith(CHECKPOINT):
            found.append(int(rest.split("/")[1]))
    return found


def test_prune_takes_what_nothing_came_from_and_nothing_else(
    first: Any, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the user's mistake above, which began a dataset version, and the continued run, which nobody registered."""
    from flows.cli import main

    runs = set((Directory(store) / "runs").children())
    (begun,) = (Directory(store) / "datasets/broken").children()
    assert not (Directory(store) / f"datasets/broken/{begun}").exists("manifest.json")
    options = ["--unused", "--older-than", "0s", "--store", store, "--json"]
    assert main(["prune", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not told["deleted"] and set((Directory(store) / "runs").children()) == runs
    assert main(["prune", *options, "--yes"]) == 0
    deleted = json.loads(capsys.readouterr().out)["candidates"]
    gone = {item["uri"] for item in deleted if item["kind"] not in ("job", "lease", "note")}
    assert gone == {f"{store}/runs/{run}" for run in runs - {first.run.run_id}} | {f"{store}/datasets/broken/{begun}"}
    assert (Directory(store) / "jobs").children() == [] and not list((Directory(store) / "leases").list())
    for reference in (first.images.set_id, first.dataset.uri, first.run.bundle_uri):
        assert main(["verify", reference, "--store", store]) == 0


@pytest.mark.timeout(240)
def test_a_version_becomes_the_champion_once_a_person_accepts_it(
    first: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real gate, asked twice, with an answer between; the pause is that of `test_automation`."""
    from diffusion_core.stages.register import RegisterRequest
    from diffusion_core.tracking import approval, champion
    from diffusion_core.tracking.approval import Question
    from flows import approval as waiting
    from flows.stages import FLOWS

    def answered_at_once(question: Question, place: str) -> None:
        assert champion(place, "asked") is None
        approval.answer(place, question, True, "Anna", "It will do.")

    monkeypatch.setattr(waiting, "_tell", answered_at_once)
    config = load_config("digits", settings=[*SETTINGS, "gate.approval=ask"], shortcuts={"store": store})
    result = FLOWS["register"](
        RegisterRequest.of(config, "asked", first.run.bundle_uri, first.dataset.uri, first.run.mlflow_run_id),
        config.backend,
    )
    assert result.promoted and result.question is None and "Accepted by Anna" in result.reason
    assert champion(store, "asked") == result.version == 1
