"""The local backend: lines come through as they are printed, and stopping a job ends its whole family."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import pytest

from diffusion_core.catalog import prune
from diffusion_core.config import UserError
from diffusion_core.jobs import backend
from diffusion_core.jobs.backend import BackendConfig, BackendKind, JobFailed, LocalJob, run_job
from diffusion_core.progress import ProgressEvent
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.store import Directory
from diffusion_core.store.patience import StoreUnavailable

REQUEST = {"model": "models:/digits@champion"}
RESULT = GenerateResult(
    seconds=1,
    reused=False,
    set_id="set",
    uri="uri",
    model_version="digits/1",
    images=2,
    generated=2,
    first_image_id=0,
    contact_sheet="sheet.png",
    total_images=2,
    images_per_second=2,
)


def program(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


def alive(pid: int) -> bool:
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(shown.strip()) and not shown.startswith("Z")


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def run_program(store: str, monkeypatch: pytest.MonkeyPatch):
    """Run a program in the place of a job: it finds the request's URI as its argument."""

    def run(text: str, **watchers):
        started = LocalJob.__init__

        def start(self: LocalJob, command: list[str]) -> None:
            started(self, [*program(text), command[-1]])

        monkeypatch.setattr(LocalJob, "__init__", start)
        return run_job("generate", GenerateRequest(store=store, **REQUEST), GenerateResult, BackendConfig(), **watchers)

    return run


def test_the_request_goes_out_and_progress_lines_and_the_result_come_back(run_program, store: str):
    events: list[ProgressEvent] = []
    lines: list[str] = []
    result = run_program(
        f"""
        import pathlib, sys
        from diffusion_core.stages.generate import GenerateRequest
        from diffusion_core.progress import Progress
        request = pathlib.Path(sys.argv[1])
        assert GenerateRequest.model_validate_json(request.read_text()).model == "{REQUEST["model"]}"
        print("hello"); print("trouble", file=sys.stderr)
        with Progress("generate", 2) as progress:
            progress.advance(2)
        (request.parent / "result.json").write_text('''{RESULT.model_dump_json()}''')
        """,
        on_progress=events.append,
        on_line=lines.append,
    )
    assert result == RESULT
    assert [event.done for event in events][-1] == 2
    assert sorted(lines) == ["hello", "trouble"]
    (job,) = (Directory(store) / "jobs").children()
    assert job.startswith("generate-")
    log = Directory(f"{store}/jobs/{job}").read("log.txt").decode()
    assert "hello" in log and "@progress" not in log


def test_a_users_mistake_keeps_its_sentence(run_program):
    with pytest.raises(UserError, match=r"^The cat is missing\.$"):
        run_program(
            """
            import json, pathlib, sys
            pathlib.Path(sys.argv[1]).with_name("error.json").write_text(json.dumps({"error": "The cat is missing."}))
            sys.exit(2)
            """
        )


def test_a_full_store_keeps_its_sentence_though_it_takes_no_file(run_program):
    text = """
        import errno, os, sys
        from diffusion_core.jobs import protocol
        from diffusion_core.stages.generate import GenerateRequest
        from diffusion_core.store import Directory

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        def run(request):
            os.replace = os.link = full
            Directory(request.store).write("images", b"")

        sys.exit(protocol.main("generate", GenerateRequest, run, sys.argv[1]))
        """
    with pytest.raises(UserError, match=r"^/.*/store/images cannot be used: the disk is full\.$"):
        run_program(text)


def test_a_broken_job_shows_the_end_of_its_log_and_where_it_is(run_program, store: str):
    with pytest.raises(JobFailed, match="exit status 1") as failure:
        run_program("raise RuntimeError('out of cheese')")
    assert "out of cheese" in str(failure.value)
    assert store in str(failure.value) and "log.txt" in str(failure.value)


def test_a_store_that_was_away_for_the_job_is_one_sentence_and_no_mistake_of_the_user(run_program):
    with pytest.raises(StoreUnavailable, match=r"^The store s3://b cannot be reached: x answered 503\.$"):
        run_program(
            """
            import sys
            from diffusion_core.jobs import protocol
            from diffusion_core.stages.generate import GenerateRequest
            from diffusion_core.store.patience import StoreUnavailable
            def run(request):
                print("generate: hello", flush=True)
                raise StoreUnavailable("The store s3://b cannot be reached: x answered 503.")
            sys.exit(protocol.main("generate", GenerateRequest, run, sys.argv[1]))
            """
        )


def test_the_log_is_in_the_store_while_the_job_runs(run_program, store: str, monkeypatch: pytest.MonkeyPatch):
    """So a killed machine leaves it; and who clears up can tell the job from one that has ended."""
    monkeypatch.setattr("diffusion_core.jobs.log.EVERY_S", 0.05)
    seen: list[bool] = []

    def look(line: str) -> None:
        (name,) = (Directory(store) / "jobs").children()
        job = Directory(f"{store}/jobs/{name}")
        wait_until(lambda: job.exists("log.txt") and f"{line}\n".encode() in job.read("log.txt"))
        seen.append(job.exists("running.json") and not list(prune.candidates(store, -1, unused=False)))

    with pytest.raises(JobFailed):
        run_program("import sys; print('one', flush=True); print('two', flush=True); sys.exit(3)", on_line=look)
    assert seen == [True, True]
    (ended,) = prune.candidates(store, -1, unused=False)
    assert not Directory(ended.uri).exists("running.json")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_bare_job_with_one_sentence(tmp_path: Path, signum: int, status: int):
    job = """
        import sys, time
        from diffusion_core.jobs import protocol
        from diffusion_core.stages.generate import GenerateRequest
        def run(request):
            print("running", flush=True)
            time.sleep(60)
        sys.exit(protocol.main("generate", GenerateRequest, run, sys.argv[1]))
    """
    (tmp_path / "request.json").write_text(GenerateRequest(store=str(tmp_path), **REQUEST).model_dump_json())
    command = [*program(job), str(tmp_path / "request.json")]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    process.send_signal(signum)
    _, said = process.communicate(timeout=20)
    assert process.returncode == status
    assert said == f"generate: stopped by {signal.Signals(signum).name}; the same request continues the work.\n"


def test_a_killed_job_is_not_a_users_mistake(run_program):
    with pytest.raises(JobFailed, match="killed by signal 9"):
        run_program("import os; os.kill(os.getpid(), 9)")


FAMILY = """
    import os, signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"])
    def leave(signum, frame):
        print(f"asked by {signum}", flush=True)
        sys.exit(0)
    if len(sys.argv) < 2 or sys.argv[1] != "stubborn":
        signal.signal(signal.SIGINT, leave); signal.signal(signal.SIGTERM, leave)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("manner", ["polite", "stubborn"])
def test_stopping_a_job_ends_its_workers_too(manner: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "GRACE_S", 0.5)
    job = LocalJob([*program(FAMILY), manner])
    heard = list(islice(job.lines(), 2))
    child = int(next(line for line in heard if line.isdecimal()))
    assert alive(job.pid) and alive(child)
    started = time.monotonic()
    job.stop(signal.SIGTERM)
    assert time.monotonic() - started < 5
    assert not alive(job.pid)
    wait_until(lambda: not alive(child))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_one_who_waits_reaches_the_job(signum: int, tmp_path: Path, store: str):
    """Ctrl-C and SIGTERM end a real `run_job` in a process of its own, with its job and the job's worker."""
    pids, said = tmp_path / "pids", tmp_path / "said"
    job = f"""
        import os, signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        def leave(signum, frame):
            open({str(said)!r}, "w").write(str(signum)); sys.exit(1)
        signal.signal(signal.SIGINT, leave); signal.signal(signal.SIGTERM, leave)
        open({str(pids)!r} + ".part", "w").write(f"{{os.getpid()}} {{child.pid}}")
        os.rename({str(pids)!r} + ".part", {str(pids)!r})
        time.sleep(60)
    """
    waiter = f"""
        import signal, sys
        from diffusion_core.jobs import backend
        from diffusion_core.stages.generate import GenerateRequest, GenerateResult
        start = backend.LocalJob.__init__
        backend.LocalJob.__init__ = lambda self, command: start(self, {program(job)!r})
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))
        request = GenerateRequest(store={store!r}, model="models:/digits@champion")
        backend.run_job("generate", request, GenerateResult, backend.BackendConfig())
    """
    process = subprocess.Popen(program(waiter), stderr=subprocess.DEVNULL)
    wait_until(pids.exists)
    family = [int(pid) for pid in pids.read_text().split()]
    process.send_signal(signum)
    assert process.wait(20) != 0
    assert said.read_text() == str(int(signum))
    wait_until(lambda: not any(map(alive, family)))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel for it")
def test_a_killed_waiter_does_not_leave_its_job_behind(tmp_path: Path):
    pids = tmp_path / "pids"
    job = f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    waiter = f"""
        from diffusion_core.jobs.backend import LocalJob
        import sys
        list(LocalJob([sys.executable, "-c", {job!r}]).lines())
    """
    process = subprocess.Popen(program(waiter))
    wait_until(lambda: pids.exists() and pids.read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(5)
    wait_until(lambda: not alive(int(pids.read_text())))


def test_the_jobs_backend_needs_an_address(store: str):
    with pytest.raises(UserError, match="RAY_API_SERVER_ADDRESS"):
        run_job(
            "generate", GenerateRequest(store=store, **REQUEST), GenerateResult, BackendConfig(kind=BackendKind.jobs)
        )
