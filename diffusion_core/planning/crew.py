"""Starts the programs of a trial: a part at a time, all its processes at once, in a scratch folder that goes after."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from diffusion_core.config import Config, UserError
from diffusion_core.jobs.local import die_with_parent
from diffusion_core.jobs.request import Resources
from diffusion_core.planning.outlook import Outlook, State
from diffusion_core.planning.trial import REFUSED, Measured, Order
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.tracking import without_secrets

Say = Callable[[str], None]

PROGRAM = (sys.executable, "-m", "diffusion_core.planning.trial")
PATIENCE_S = 1200.0  # with processes that prepare themselves, and again with those that work
VISIBLE = "CUDA_VISIBLE_DEVICES"


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
    reading, writing = os.pipe()  # every process reads from it, and begins when it ends
    with os.fdopen(reading) as start, os.fdopen(writing, "w") as held_back, ExitStack() as ending:
        port = _free_port()
        tries = []
        for rank in range(workers):
            path = Path(order.folder) / f"{part}.{rank}.json"
            path.write_text(order.model_copy(update={"rank": rank, "began": time.time()}).model_dump_json())
            tries.append(_Try(part, path, start, environment(part, rank, workers, port, gpus)))
            ending.callback(tries[-1].end)
        _wait(tries, lambda each: each.is_ready)
        held_back.close()
        _wait(tries, lambda each: each.process.poll() == 0)
        return _together(part, [each.measured for each in tries])


class _Try:
    """One process of a part. It prints into files, as reading a pipe would wait for it while another one breaks."""

    def __init__(self, part: str, path: Path, start: IO[str], variables: Mapping[str, str]) -> None:
        self.part, self._told, self._log = part, path.with_suffix(".out"), path.with_suffix(".log")
        with self._told.open("w") as told, self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, part, str(path)],
                stdin=start,
                stdout=told,
                stderr=log,
                preexec_fn=die_with_parent,
                env={**os.environ, **variables},
            )

    @property
    def is_ready(self) -> bool:
        return "ready" in self._told.read_text().splitlines()

    @property
    def measured(self) -> Measured:
        return Measured.model_validate_json(self._told.read_text().splitlines()[-1])

    @property
    def broken(self) -> UserError:
        """What it says of itself when it refuses, or the last line of its traceback."""
        status = self.process.wait()
        lines = (self._told if status == REFUSED else self._log).read_text().splitlines()
        why = without_secrets(lines[-1]) if lines else f"exit status {status}"
        return UserError(f"The trial of the part {self.part} broke, and nothing can be said of its time: {why}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _wait(tries: list[_Try], is_over: Callable[[_Try], bool]) -> None:
    """Until it is over for all. `UserError` at the deadline, or if one ended before, for which others would wait."""
    deadline, left = time.monotonic() + PATIENCE_S, tries
    while left:
        ended = [each for each in left if each.process.poll() is not None]
        left = [each for each in left if not is_over(each)]
        if broken := [each for each in ended if each in left]:
            raise broken[0].broken
        if left and time.monotonic() > deadline:
            raise UserError(f"The trial of the part {left[0].part} was given up after {PATIENCE_S / 60:.0f} minutes.")
        time.sleep(0.05)


def environment(part: str, rank: int, workers: int, port: int, gpus: int) -> dict[str, str]:
    """The variables that a process of a part finds: the world of its training, and the GPUs that it sees.

    As Ray does it: none where none is reserved, else one for each; a training chooses its own among all of them.
    """
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = {name: str(value) for name, value in world.items()}
    if not gpus:
        variables[VISIBLE] = ""
    elif part != "train":
        listed = os.environ.get(VISIBLE)
        variables[VISIBLE] = str(rank) if listed is None else listed.split(",")[rank].strip()
    return variables


def _together(part: str, found: list[Measured]) -> PartResult:
    """Processes of a training advance in step, so that one rate is that of all; the others' rates add up."""
    figures = found[0].figures  # of a training the leader's, who writes
    if part != "train":
        sums = {name: sum(each.figures[name] for each in found) for name in figures}
        figures = {name: all_ if name.endswith("_per_second") else all_ / len(found) for name, all_ in sums.items()}
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
