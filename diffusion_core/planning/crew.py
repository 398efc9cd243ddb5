"""Starts the programs of a trial: a part at a time, all its processes at once, in a scratch folder that goes after."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from diffusion_core.config import Config, UserError
from diffusion_core.jobs.local import die_with_parent
from diffusion_core.jobs.request import Resources
from diffusion_core.planning.outlook import Outlook, State
from diffusion_core.planning.trial import Measured, Order
from diffusion_core.stages.config import PipelineConfig

Say = Callable[[str], None]


class PartResult(Config):
    """What the processes of one part found together.

    workers: how many there were; ready_s: until the last could begin; figures: the mean of what each found, those by
    the second added up over the processes where they worked side by side.
    """

    workers: int
    ready_s: float
    figures: dict[str, float]
    peak_bytes: int
    peak_gpu_bytes: int


Trial = dict[str, PartResult]  # by part


def measure(config: PipelineConfig, outlook: Outlook, say: Say = lambda text: None) -> Trial:
    """Try what the pipeline would have to do.

    Raises:
        UserError: a part could not be tried; its sentence says why.
    """
    work = outlook.work
    todo = {name for name, each in work.items() if each.state is not State.done}
    trial: Trial = {}
    with tempfile.TemporaryDirectory(prefix="diffusion-plan-") as folder:
        order = Order(
            config=config,
            folder=folder,
            image_shape=outlook.image_shape,
            class_names=outlook.class_names,
            samples=outlook.samples,
            train_rows=outlook.rows.get("train", 1),
            bundle_uri=outlook.bundle_uri,
            digests=dict(outlook.digests) if "shard" in todo else {},
        )
        for part, resources in _wanted(config, todo).items():
            say(f"trying {part} …")
            trial[part] = _run(part, order, resources)
    return trial


def _wanted(config: PipelineConfig, todo: set[str]) -> dict[str, Resources]:
    """The parts to try, with the workers that would do them."""
    alone, wanted = Resources(workers=1), config.resources
    found = {"ray": alone} if todo - {"register"} else {}
    if "shard" in todo:
        found["shard"] = wanted.shard
    if "train" in todo:
        found["train"] = wanted.train
    if todo & {"evaluate", "generate"}:
        found["sample"] = wanted.generate
    if "evaluate" in todo:
        found["figures"] = alone
    return found


def _run(part: str, order: Order, resources: Resources) -> PartResult:
    """All processes of a part, started together and let go together; no more than this machine has room for."""
    gpus = _gpus() if resources.gpus_per_worker else 0
    workers = min(resources.workers, gpus or os.cpu_count() or 1)
    path = Path(order.folder) / f"{part}.json"
    processes = []
    port = _free_port()
    try:
        for rank in range(workers):
            own = path.with_suffix(f".{rank}.json")
            own.write_text(order.model_copy(update={"rank": rank, "began": time.time()}).model_dump_json())
            processes.append(_start(part, own, rank, workers, port, gpus))
        for process in processes:
            _expect_ready(part, process)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [_answer(part, process) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return _together(part, found)


def _start(part: str, order: Path, rank: int, workers: int, port: int, gpus: int) -> subprocess.Popen[str]:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}  # as Ray hides them from a worker that reserves none
    with order.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "diffusion_core.planning.trial", part, str(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=die_with_parent,
            env={**os.environ, **{name: str(value) for name, value in world.items()}, **hidden},
        )


def _expect_ready(part: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            return
    raise _broken(part, process)


def _answer(part: str, process: subprocess.Popen[str]) -> Measured:
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    if process.wait() or not lines:
        raise _broken(part, process)
    return Measured.model_validate_json(lines[-1])


def _broken(part: str, process: subprocess.Popen[str]) -> UserError:
    log = Path(str(process.args[-1])).with_suffix(".log").read_text().rstrip().splitlines()  # type: ignore[index]
    why = log[-1] if log else f"exit status {process.wait()}"
    return UserError(f"The trial of the part {part} broke, and nothing can be said of its time: {why}")


def _together(part: str, found: list[Measured]) -> PartResult:
    """Processes of a training advance in step, so that one rate is that of all; the others' rates add up."""
    names = found[0].figures
    figures = {name: sum(each.figures[name] for each in found) / len(found) for name in names}
    if part != "train":
        figures |= {name: value * len(found) for name, value in figures.items() if name.endswith("_per_second")}
    else:
        figures = found[0].figures  # the leader's, who writes
    return PartResult(
        workers=len(found),
        ready_s=max(each.ready_s for each in found),
        figures=figures,
        peak_bytes=max(each.peak_bytes for each in found),
        peak_gpu_bytes=max(each.peak_gpu_bytes for each in found),
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
