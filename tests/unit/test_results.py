"""What people are told at the end, and while they wait."""

from __future__ import annotations

import io

from diffusion_core.jobs.requests import EvaluateResult, GenerateResult, RegisterResult, ShardResult, TrainResult
from diffusion_core.progress import ProgressEvent
from flows.display import Lines, Pace, current_display, shown
from flows.results import PipelineResult, aligned, figure_table, markdown, next_commands, pipeline_rows

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
    text = aligned(pipeline_rows(RESULT))
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
        "shard 3 (found done), train 61, evaluate 9, register 2, generate 8",
    ):
        assert part in text
    assert "| model version | models:/digits/3" in markdown(pipeline_rows(RESULT), "Pipeline")
    assert figure_table(RESULT.evaluation)[1]["held-out real images (floor)"] is None


def test_the_next_commands_are_accepted_by_the_command():
    from flows.cli import app

    commands = next_commands(RESULT, "--preset digits")
    assert len(commands) == 3
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    for command in commands:
        program, verb, *arguments = command.split()
        assert program == "diffusion" and verb in verbs
        assert "--store" in arguments


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
