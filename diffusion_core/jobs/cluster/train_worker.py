"""What each worker of a training run executes, and how it and the job hear of each other: through the run's directory.

Each worker writes where it is into `attempts/<n>.worker-<rank>.json`. The leader writes `progress.json` and looks for
`attempts/<n>.stop.json`; whichever meets an error that the user can mend writes `attempts/<n>.error.json`. So a job on
another machine, or a second one that merely watches, sees as much as the one that started the workers.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from contextlib import suppress
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.jobs.account import Usage, measured
from diffusion_core.jobs.record import open_recorder
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import patience
from diffusion_core.tracking import FlowRun
from diffusion_core.traffic import Traffic
from diffusion_core.training.run import INTERRUPTED, RunDirectory, TrainSpec

logger = logging.getLogger(__name__)

PROGRESS = layout.PROGRESS
_LOOK_S = 1.0
_LOOK_PATIENCE_S = 10.0
_SETTLE_S = 5.0  # for the figures of a run that broke
_MLFLOW = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # the recorder tries again


def stop_key(attempt: int) -> str:
    return f"{attempt}.stop.json"


def error_key(attempt: int) -> str:
    return f"{attempt}.error.json"


def worker_key(attempt: int, rank: int) -> str:
    return f"{attempt}.worker-{rank}.json"


def usage_key(attempt: int, rank: int) -> str:
    return f"{attempt}.usage-{rank}.json"


def usage_of(run: RunDirectory, attempt: int, workers: int) -> Usage:
    """What the workers of an attempt took; those that died did not tell."""
    told = Usage()
    for rank in range(workers):
        with suppress(FileNotFoundError):
            found = run.attempts.read_json(usage_key(attempt, rank))
            told += Usage(found["cpu_seconds"], Traffic(found["bytes_written"], found["s3_requests"]))
    return told


def recorded_error(run: RunDirectory, attempt: int) -> str | None:
    """The sentence for the user that ended an attempt; None if there is none."""
    try:
        return str(run.attempts.read_json(error_key(attempt))["error"])
    except FileNotFoundError:
        return None


def work(order: dict[str, Any]) -> dict[str, Any] | None:
    """Train as one of Ray Train's workers.

    Args:
        order: store, run_uri, spec (a dumped TrainSpec), attempt, experiment, start (bundle URI or None), asked_by
            (a dumped FlowRun or None).

    Returns:
        The dumped TrainOutcome; None if a user error is recorded.
    """
    import ray.train.torch

    from diffusion_core.training.loop import DivergedError, train
    from diffusion_core.training.world import World

    run, attempt = RunDirectory(Directory(order["run_uri"])), int(order["attempt"])
    if recorded_error(run, attempt) is not None:
        return None  # a restart cannot mend what the user has to mend
    spec = TrainSpec.model_validate(order["spec"])
    world = World.join(ray.train.torch.get_device())
    run.attempts.write_json(worker_key(attempt, world.rank), _whereabouts(world.device))
    watch = Watch(run, attempt, spec.training.target_images) if world.leads else None
    recorder = None
    try:
        for name, value in _MLFLOW.items():
            os.environ.setdefault(name, value)
        if world.leads:
            asked_by = order["asked_by"] and FlowRun.model_validate(order["asked_by"])
            recorder = open_recorder(order["store"], run, spec, order["experiment"], asked_by)
        should_stop = watch.should_stop if watch else lambda: None
        outcome, usage = measured(lambda: train(spec, run, world, recorder, watch, should_stop, order["start"]))
        told = {"cpu_seconds": usage.cpu_seconds, **usage.traffic._asdict()}
        run.attempts.write_json(usage_key(attempt, world.rank), told)
    except UserError as error:
        run.attempts.create_json(error_key(attempt), {"error": str(error)})
        if isinstance(error, DivergedError):
            return None  # all workers stopped here together
        raise  # the others wait for this worker: its failure ends them
    finally:
        if recorder is not None:
            recorder.settle(_SETTLE_S)
        if watch is not None:
            watch.close()
    return outcome.model_dump(mode="json")


def _whereabouts(device: Any) -> dict[str, Any]:
    import ray

    context = ray.get_runtime_context()
    return {
        "node": context.get_node_id(),
        "ip": ray.util.get_node_ip_address(),
        "pid": os.getpid(),
        "device": str(device),
    }


class Watch:
    """The leader's ear and voice: a thread that writes the progress and looks whether to stop, once a second.

    The training loop never waits for the store because of it.
    """

    def __init__(self, run: RunDirectory, attempt: int, total: float | None) -> None:
        self.total = total
        self._run, self._attempt = run, attempt
        self._began: float | None = None
        self._done: float | None = None
        self._figures: dict[str, float] = {}
        self._told: tuple[Any, ...] = ()
        self._reason: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def update(self, done: float, **figures: float) -> None:
        """`done` images are seen."""
        self._done = done
        self._began = done if self._began is None else self._began
        self._figures.update(figures)

    def should_stop(self) -> str | None:
        return self._reason

    def close(self) -> None:
        """Write the last progress and end the thread."""
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            closing = self._closed.wait(_LOOK_S)
            try:
                with patience(_LOOK_PATIENCE_S):
                    self._tell()
                    self._reason = self._why_stop() or self._reason  # a run that is asked to stop can still be lost
            except Exception:  # a store that is away for a moment must not end the training
                logger.warning("The run's directory %s cannot be reached.", self._run.directory.uri, exc_info=True)
            if closing:
                return

    def _why_stop(self) -> str | None:
        from diffusion_core.training.loop import LOST

        if self._run.attempts.exists(f"{self._attempt + 1}.json"):
            return LOST
        return INTERRUPTED if self._run.attempts.exists(stop_key(self._attempt)) else None

    def _tell(self) -> None:
        figures = {name: value for name, value in self._figures.items() if math.isfinite(value)}
        now = (self._done, self.total, tuple(sorted(figures.items())))
        if self._done is None or now == self._told:
            return
        told = {"attempt": self._attempt, "began": self._began, "done": self._done, "total": self.total}
        self._run.directory.write_json(PROGRESS, {**told, "figures": figures})
        self._told = now
