"""Progress lines: what a job prints is what the reader understands, at most once a second, and always at the end."""

from __future__ import annotations

from diffusion_core.progress import Progress, ProgressEvent, clock, parse_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_at_most_one_line_a_second_and_one_at_the_end():
    lines: list[str] = []
    time = Clock()
    with Progress("train", 1000, write=lines.append, clock=time) as progress:
        for _ in range(100):
            time.now += 0.1
            progress.advance(10, loss=0.25)
    assert 9 <= len(lines) <= 12
    last = parse_progress(lines[-1])
    assert last is not None
    assert (last.stage, last.done, last.total, last.unit) == ("train", 1000, 1000, "images")
    assert last.figures == {"loss": 0.25}
    assert last.rate is not None and abs(last.rate - 100) < 5
    assert last.seconds_left == 0


def test_the_rate_is_right_from_the_first_seconds_of_work_that_continues():
    lines: list[str] = []
    time = Clock()
    progress = Progress("train", 10_000, write=lines.append, clock=time, initial=None)
    time.now += 5
    for done in (5_000, 5_050, 5_100):
        progress.update(done)
        time.now += 1
    first, *_, last = map(parse_progress, lines)
    assert first is not None and (first.done, first.rate, first.seconds_left) == (5_000, None, None)
    assert last is not None and (last.rate, last.seconds_left) == (50, 98)


def test_going_back_to_a_checkpoint_gives_no_negative_rate():
    lines: list[str] = []
    time = Clock()
    progress = Progress("train", 1_000, write=lines.append, clock=time)
    for done in (100, 200, 300, 150, 250):
        time.now += 1
        progress.update(done)
    back, again = map(parse_progress, lines[-2:])
    assert back is not None and (back.done, back.rate) == (150, None)
    assert again is not None and (again.rate, again.seconds_left) == (100, 7.5)


def test_rate_forgets_a_slow_start_and_work_found_done():
    lines: list[str] = []
    time = Clock()
    progress = Progress("train", 10_000, write=lines.append, clock=time, initial=5_000)
    time.now += 300
    for _ in range(40):
        time.now += 1
        progress.advance(50)
    last = parse_progress(lines[-1])
    assert last is not None and last.rate is not None and last.seconds_left is not None
    assert abs(last.rate - 50) < 3
    assert abs(last.seconds_left - (10_000 - 7_000) / 50) < 5


def test_an_unknown_total_and_a_figure_that_is_not_finite():
    lines: list[str] = []
    with Progress("hash", None, "files", write=lines.append) as progress:
        progress.update(3, loss=float("nan"))
    event = parse_progress(lines[-1])
    assert event is not None
    assert (event.total, event.seconds_left, event.figures) == (None, None, {})


def test_the_mark_may_follow_a_prefix_and_broken_lines_are_nothing():
    event = ProgressEvent("generate", 3, 10, rate=2.0, seconds_left=3.5)
    assert parse_progress(f"(pid=12, ip=10.0.0.1) {event.line()}\n") == event
    assert parse_progress("") is None
    assert parse_progress("@progress {broken") is None
    assert parse_progress("@progress [1]") is None
    assert parse_progress('@progress {"stage":"x","done":"many"}') is None
    assert parse_progress('@progress {"stage":"x","done":1,"colour":2}') is None
    assert parse_progress("loss 0.2") is None


def test_a_sentence_for_people():
    event = ProgressEvent("train", 12_800, 64_000, rate=512.3, seconds_left=100, figures={"loss": 0.08127})
    assert event.sentence() == "train: 12,800 of 64,000 images (20 %), 512 images/s, 1:40 left, loss 0.08127"
    assert [clock(7), clock(750), clock(11_100)] == ["0:07", "12:30", "3:05:00"]


def test_a_listener_hears_what_is_new(monkeypatch):
    """Not what was done before, and not twice."""
    heard = []
    monkeypatch.setattr("diffusion_core.progress.listeners", [lambda event, new: heard.append((event.done, new))])
    with Progress("train", 100, initial=None, interval_s=0, write=lambda line: None) as shown:
        shown.update(40)
        shown.update(60)
        shown.update(50)  # done again from an older checkpoint
        shown.update(70)
    assert heard == [(40, 0), (60, 20), (50, 0), (70, 20), (70, 0)]
