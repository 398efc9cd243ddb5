"""What a job prints as JSON lines: each line has its ids, and who follows the job reads the same as without."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from diffusion_core.jobs.backend import BackendConfig, run_job
from diffusion_core.jobs.lines import plain
from diffusion_core.jobs.local import LocalJob
from diffusion_core.jobs.transport import JobFailed
from diffusion_core.progress import ProgressEvent
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.store import Directory
from diffusion_core.store.patience import StoreUnavailable

JOB = """
    import logging, sys
    from diffusion_core.jobs import protocol
    from diffusion_core.jobs.context import about
    from diffusion_core.stages.generate import GenerateRequest
    from diffusion_core.store.patience import StoreUnavailable
    from diffusion_core.progress import Progress
    def run(request):
        print("(pid=7) a line of a worker")
        about(set_id="cat-set")
        logging.getLogger("diffusion_core.jobs").warning("it is %d o'clock\\nnearly", 5)
        with Progress("generate", 2) as progress:
            progress.advance(2)
        {end}
    sys.exit(protocol.main("generate", GenerateRequest, run, sys.argv[1]))
"""


def follow(store: str, monkeypatch: pytest.MonkeyPatch, end: str) -> tuple[list[str], list[ProgressEvent], list[dict]]:
    """Run a job that ends as told: the lines and events that its waiter hears, and the records of its log."""
    monkeypatch.setenv("DIFFUSION_LOG_FORMAT", "json")
    started = LocalJob.__init__
    program = [sys.executable, "-c", textwrap.dedent(JOB.replace("{end}", end))]
    monkeypatch.setattr(LocalJob, "__init__", lambda self, command: started(self, [*program, command[-1]]))
    lines, events = list[str](), list[ProgressEvent]()
    kind = StoreUnavailable if "StoreUnavailable" in end else JobFailed
    with pytest.raises(kind, match="out of cheese") as failure:
        request = GenerateRequest(store=store, model="models:/digits@champion")
        run_job("generate", request, GenerateResult, BackendConfig(), on_line=lines.append, on_progress=events.append)
    if kind is JobFailed:
        assert "RuntimeError: out of cheese" in str(failure.value) and '{"time"' not in str(failure.value)
    else:
        assert str(failure.value) == "The store is out of cheese."
    (job,) = (Directory(store) / "jobs").children()
    place = Directory(f"{store}/jobs/{job}")
    assert place.read_json("ids.json") == {"set_id": "cat-set"}
    records = [json.loads(line) for line in place.read("log.txt").decode().splitlines()]
    assert all(record["job_id"] == job and record["stage"] == "generate" for record in records)
    return lines, events, records


def test_every_line_is_a_record_with_the_ids_that_are_known(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, events, records = follow(store, monkeypatch, "raise RuntimeError('out of cheese')")
    assert [event.done for event in events][-1] == 2
    worker, warning, broke = records
    assert (worker["logger"], worker["message"]) == ("stdout", "(pid=7) a line of a worker") and "set_id" not in worker
    assert (warning["level"], warning["message"], warning["set_id"]) == (
        "WARNING",
        "it is 5 o'clock\nnearly",
        "cat-set",
    )
    assert broke["level"] == "CRITICAL" and "Traceback" in broke["exception"]
    assert lines[0] == worker["message"] and "diffusion_core.jobs WARNING: it is 5 o'clock" in lines[1]


def test_a_sentence_is_heard_through_it(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, records = follow(store, monkeypatch, "raise StoreUnavailable('The store is out of cheese.')")
    assert (records[-1]["level"], records[-1]["message"]) == ("ERROR", "generate: The store is out of cheese.")


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_LOG_FORMAT", "xml")
    command = [sys.executable, "-m", "diffusion_core.stages", "generate", str(tmp_path / "request.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        2,
        "generate: DIFFUSION_LOG_FORMAT: 'xml' is not accepted: json or text.\n",
    )


@pytest.mark.parametrize("line", ["", "hello", '{"time":', '{"a": 1}'])
def test_other_lines_stay_what_they_are(line: str) -> None:
    assert plain(line) == line
