"""The processes of a trial: what they see, how they begin together, and what becomes of one that breaks."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.config import UserError
from diffusion_core.jobs.request import Resources
from diffusion_core.planning import crew, trial
from diffusion_core.planning.crew import PartResult
from diffusion_core.stages.settings import load_config


@pytest.mark.parametrize(
    ("part", "gpus", "listed", "seen"),
    [
        ("sample", 0, "0,1", ["", ""]),
        ("sample", 2, None, ["0", "1"]),
        ("sample", 2, "3, GPU-7f", ["3", "GPU-7f"]),
        ("train", 2, "3,5", [None, None]),
    ],
)
def test_each_process_sees_a_gpu_of_its_own(
    part: str, gpus: int, listed: str | None, seen: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(crew.VISIBLE, raising=False)
    if listed is not None:
        monkeypatch.setenv(crew.VISIBLE, listed)
    found = [crew.environment(part, rank, 2, 29500, gpus) for rank in range(2)]
    assert [each.get(crew.VISIBLE) for each in found] == seen
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in found] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]


def order(folder: Path) -> trial.Order:
    return trial.Order(
        config=load_config("digits"),
        folder=str(folder),
        image_shape=(8, 8, 1),
        class_names=(),
        samples=8,
        train_rows=8,
    )


def process(*lines: str) -> tuple[str, ...]:
    """A program in the place of a trial's, which knows its rank."""
    return sys.executable, "-c", "\n".join(["import os, sys, time", "rank = int(os.environ['RANK'])", *lines])


MEASURED = trial.Measured(ready_s=1, figures={"images_per_second": 4.0}).model_dump_json()
READY = ["print('ready', flush=True)", "sys.stdin.read()"]


def run(program: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> PartResult:
    monkeypatch.setattr(crew, "PROGRAM", program)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    return crew._run("sample", order(folder), Resources(workers=2))


def test_all_begin_when_the_last_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = ["time.sleep(0.5 * rank)", "ready = time.time()", *READY]
    note = f"open(f'{tmp_path}/{{rank}}', 'w').write(f'{{ready}} {{time.time()}}')"
    found = run(process(*late, note, f"print({MEASURED!r})"), tmp_path, monkeypatch)
    assert found.workers == 2 and found.figures == {"images_per_second": 8.0}
    times = [[float(word) for word in (tmp_path / str(rank)).read_text().split()] for rank in range(2)]
    assert min(begun for _, begun in times) > max(ready for ready, _ in times)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (
            ["if rank: raise OSError('none at http://me:pass@host/x?key=1')", "time.sleep(60)"],
            "OSError: none at http://host/x",
        ),
        (
            [*READY, "if rank: print('source.uri: it is gone.') or sys.exit(2)", "time.sleep(60)"],
            "source.uri: it is gone.",
        ),
        (["if rank: os._exit(7)", "time.sleep(60)"], "exit status 7"),
    ],
)
def test_a_process_that_ends_early_ends_the_trial_of_its_part(
    lines: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        run(process(*lines), tmp_path, monkeypatch)
    assert str(error.value) == f"The trial of the part sample broke, and nothing can be said of its time: {why}"
    assert time.monotonic() - began < 30


def test_processes_that_never_come_to_an_end_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "PATIENCE_S", 0.2)
    with pytest.raises(UserError, match="part sample was given up"):
        run(process("time.sleep(60)"), tmp_path, monkeypatch)


def test_a_mistake_of_the_user_is_told_as_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(given: trial.Order) -> Any:
        raise UserError(f"source.uri: {given.folder} is not a folder.")

    path = tmp_path / "order.json"
    path.write_text(order(Path("here")).model_dump_json())
    monkeypatch.setitem(trial.PARTS, "shard", refuse)
    monkeypatch.setattr(sys, "argv", ["trial", "shard", str(path)])
    assert trial.main() == trial.REFUSED
    assert capsys.readouterr().out == "source.uri: here is not a folder.\n"
