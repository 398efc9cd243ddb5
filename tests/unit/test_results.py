"""What people are told at the end, and while they wait."""

from __future__ import annotations

import io
import re
import shlex
from typing import Any

from diffusion_core.config import digest
from diffusion_core.jobs.request import Account
from diffusion_core.progress import ProgressEvent
from diffusion_core.stages import evaluate
from diffusion_core.stages.evaluate import EvaluateResult, figure_rows
from diffusion_core.stages.generate import GenerateResult
from diffusion_core.stages.pipeline import STEPS, PipelineResult, account_rows, rows
from diffusion_core.stages.register import RegisterResult
from diffusion_core.stages.shard import ShardResult
from diffusion_core.stages.train import TrainResult
from flows import last_run
from flows.display import Lines, Pace, current_display, shown
from flows.results import aligned, columns, markdown, section, table

RESULT = PipelineResult(
    name="digits",
    store="/s",
    dataset=ShardResult(
        seconds=3, reused=True, uri="/s/datasets/digits/v1", version="v1", splits={"train": 1438}, rejected=2, shards=3
    ),
    run=TrainResult(
        seconds=61,
        reused=False,
        run_id="r1",
        run_uri="/s/runs/r1",
        bundle_uri="/s/runs/r1/bundles/64000",
        images_seen=64000,
        loss=0.0813,
        images_per_second=700,
        mlflow_run_id="m1",
    ),
    evaluation=EvaluateResult(
        seconds=9, reused=False, uri="/s/e", figures={"frechet": 12.5, "accuracy": 0.97}, floor={"frechet": 4.5}
    ),
    version=RegisterResult(
        seconds=2, reused=False, model="digits", version=3, promoted=True, reason="It is the first.", figures={}
    ),
    images=GenerateResult(
        seconds=8,
        reused=False,
        set_id="i1",
        uri="/s/images/i1",
        model_version="digits/3",
        images=1000,
        generated=990,
        first_image_id=0,
        contact_sheet="/s/images/i1/contact-sheet.png",
        total_images=1000,
        images_per_second=125,
    ),
)


def test_the_table_at_the_end_has_everything():
    text = aligned(rows(RESULT))
    for part in (
        "/s/datasets/digits/v1",
        "2 rejected",
        "r1",
        "64,000 images seen",
        "0.08130",
        "frechet 12.5 (held-out real images: 4.5)",
        "accuracy 0.97",
        "models:/digits/3  champion",
        "It is the first.",
        "1,000 images, 990 new",
        "/s/images/i1/contact-sheet.png",
        "shard 3 s (found done)",
        "train 61 s",
    ):
        assert part in text
    report = markdown("Pipeline", table(rows(RESULT)), section("Loss", None))
    assert report.startswith("## Pipeline\n\n| | |\n") and "Loss" not in report
    assert "| model version | models:/digits/3" in report
    assert evaluate.table(RESULT.evaluation)[1]["held-out real images (floor)"] is None
    assert columns([{"a": "1"}, {"b": "x|y"}]) == "| a | b |\n| --- | --- |\n| 1 |  |\n|  | x\\|y |"


def test_what_was_taken_stands_beside_what_was_planned():
    account = Account(
        seconds=60, cpu_seconds=720, gpu_seconds=36, images=6400, bytes_written=2_500_000, s3_requests=1234
    )
    counted = RESULT.run.model_copy(update={"account": account})
    told = RESULT.model_copy(update={"run": counted, "predicted": {"shard": 70.0, "train": 55.0, "evaluate": 12.2}})
    assert [line for _, line in account_rows(told)] == [
        "shard 3 s (found done)",
        "train 61 s (planned 55), 106.7 images/s, 0.200 CPU hours, 0.010 GPU hours, 2.5 MB written, "
        "1,234 requests to S3",
        "evaluate 9 s (planned 12)",
        "register 2 s",
        "generate 8 s",
    ]


def test_an_error_stands_beside_its_figure():
    names = ("kernel_distance", "kernel_distance_error", "kid", "kid_error", "recall")
    figures = dict(zip(names, (-4.3987, 4.96, 0.01234, 0.00061, 0.5), strict=True))
    floor = {"kernel_distance": -4.11, "kernel_distance_error": 4.6, "kid": 0.0, "kid_error": 0.0}
    result = EvaluateResult(seconds=1, reused=False, uri="/s/e", figures=figures, floor=floor)
    assert [line for _, line in figure_rows(result)] == [
        "kernel_distance -4.4 ± 5.0 (held-out real images: -4.1 ± 4.6)",
        "kid 0.01234 ± 0.00061 (held-out real images: 0)",
        "recall 0.5",
    ]


def test_the_next_commands_continue_the_same_run(monkeypatch, tmp_path, capsys):
    """What a pipeline prints at its end is typed again, word for word, and asks for the same training and images."""
    from flows import cli, runner

    asked: dict[str, Any] = {}
    results = {runner.PIPELINE: RESULT, "train": RESULT.run, "generate": RESULT.images}

    def run_flow(name: str, check: Any, request: Any, *_: Any) -> Any:
        asked[name] = request
        return results[name].model_copy(update={"store": request.store} if name == runner.PIPELINE else {})

    monkeypatch.setattr(runner, "run_flow", run_flow)
    file = tmp_path / "my settings.yaml"
    file.write_text("preset: digits\ntraining: {learning_rate: 0.01}\n")
    typed = ["--config", str(file), "--store", str(tmp_path / "my store"), "--name", "pets", "--workers", "3"]
    typed += ["--set", "training.betas=[0.8, 0.9]", "--set", "generation.seed=5", "--image-size", "4"]
    typed += ["--batch-size", "96", "--init-from", "models:/big cats/1", "--backend", "jobs"]
    assert cli.main(["pipeline", *typed]) == 0
    lineage, *others = capsys.readouterr().out.partition("\nnext:\n")[2].splitlines()
    assert shlex.split(lineage) == ["diffusion", "lineage", RESULT.images.uri, "--store", str(tmp_path / "my store")]
    for command in others:
        program, *arguments = shlex.split(command)
        assert program == "diffusion" and cli.main(arguments) == 0

    pipeline, done = asked[runner.PIPELINE], {"dataset": RESULT.dataset, "run": RESULT.run, "version": RESULT.version}
    for step in (step for step in STEPS if step.stage in ("train", "generate")):
        request, first = asked[step.stage], step.request(pipeline, done)
        assert digest(request) == digest(first)
        assert (request.store, request.resources.workers) == (first.store, 3)
    train = asked["train"]
    assert (train.spec.training.batch_size, train.spec.training.init_from) == (96, "models:/big cats/1")
    assert (train.experiment, train.spec.training.images) == ("pets", 128_000)


def test_plain_lines_come_at_growing_intervals():
    now = 0.0
    pace = Pace(longest_s=30, clock=lambda: now)
    let_through = []
    for second in range(200):
        now = float(second)
        if pace.due(ProgressEvent("train", second, 200)):
            let_through.append(second)
    assert let_through == [0, 5, 15, 35, 65, 95, 125, 155, 185]
    assert pace.due(ProgressEvent("train", 200, 200))
    assert not pace.due(ProgressEvent("train", 200, 200))


def test_news_go_to_the_stream_of_whoever_asked():
    stream = io.StringIO()
    with shown(stream) as display:
        assert isinstance(display, Lines) and current_display() is display
        current_display().progress(ProgressEvent("train", 1, 2, rate=3.0, seconds_left=4.0))
        current_display().say("hello")
    assert stream.getvalue() == "  train: 1 of 2 images (50 %), 3 images/s, 0:04 left\nhello\n"
    current_display().say("nobody hears this")
    assert "nobody" not in stream.getvalue()


def test_the_second_time_says_since_when_nothing_changed(tmp_path):
    result = RESULT.model_copy(update={"store": str(tmp_path)})
    assert last_run.news(result) == "Done: train, evaluate, register, generate."
    again = result.model_copy(update={"images": result.images.model_copy(update={"generated": 0})})
    assert re.fullmatch(r"Nothing changed since \d{4}-\d\d-\d\d \d\d:\d\d UTC; no new images\.", last_run.news(again))
    assert last_run.news(result).endswith("; 990 new images.")
    longer = again.model_copy(update={"run": again.run.model_copy(update={"bundle_uri": "/s/runs/r1/bundles/128000"})})
    assert last_run.news(longer).startswith("Done: ")
