"""The group of Ray Train's workers that trains a run, and what went wrong with it, for people.

Ray's own checkpoint manager is given nothing to manage: progress is what `<run>/checkpoints` holds. When a worker dies,
Ray starts the group again inside the same attempt, and the group finds the newest checkpoint there, as a later attempt
would.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.jobs.cluster.reserve import busy, missing_resources, shortage
from diffusion_core.jobs.cluster.train_worker import work
from diffusion_core.jobs.request import Resources

_START_TRIES = 2  # of the worker group, each with an equal share of resources.start_timeout_s
_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class TrainingError(RuntimeError):
    """The workers failed more often than resources.max_failures allows."""


class Fit:
    """`TorchTrainer.fit` in a thread: in the main thread it would take over SIGINT and exit with status 0."""

    def __init__(self, order: dict[str, Any], resources: Resources) -> None:
        self.answer: Any = None
        self.error: BaseException | None = None
        self._order, self._resources = order, resources
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """True once it is over."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        scratch = tempfile.mkdtemp(prefix="diffusion-train-")
        try:
            self.answer = self._trainer(scratch).fit().return_value
        except BaseException as error:
            self.error = error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _trainer(self, scratch: str) -> Any:
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer: Any = TorchTrainer

        class QuietTrainer(trainer):
            """Without the placement group cleaner, a detached actor that logs an error every second where Ray has no
            dashboard, and outlives the job there. Ray removes the group of a dead controller by itself."""

            def _create_default_callbacks(self) -> list[Any]:
                callbacks: list[Any] = super()._create_default_callbacks()
                return [one for one in callbacks if type(one).__name__ != "PlacementGroupCleanerCallback"]

        resources = self._resources
        os.environ.update(_RAY_TRAIN)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(resources.start_timeout_s / _START_TRIES)
        gpus = resources.gpus_per_worker
        failures: dict[str, Any] = {
            "max_failures": resources.max_failures,
            "controller_failure_limit": _START_TRIES - 1,
            "max_preemption_failures": resources.max_failures,
        }
        logs: dict[str, Any] = {"logging_config": LoggingConfig(log_level="ERROR")}
        train_fn: Any = work
        return QuietTrainer(
            train_fn,
            train_loop_config=self._order,
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
                placement_strategy="SPREAD" if resources.spread else "PACK",
                accelerator_type=resources.accelerator_type,
            ),
            run_config=RunConfig(
                name=f"attempt-{self._order['attempt']}",
                storage_path=scratch,
                failure_config=FailureConfig(**failures),
                **logs,
            ),
        )


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM inside the block instead of dying of them, where this is the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda got, frame: received.append(got))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explained(error: BaseException, resources: Resources) -> Exception:
    """What went wrong, for people: too few free resources is theirs to mend, dead workers are named."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, ControllerError) and "Timeout" in type(error.controller_failure).__name__:
        return _did_not_start(resources)
    if isinstance(error, WorkerGroupError):
        causes = "; ".join(
            f"worker {rank}: {_last_line(failure)}" for rank, failure in sorted(error.worker_failures.items())
        )
        limit = f"{resources.max_failures} times (resources.max_failures)"
        return TrainingError(f"Workers failed more than {limit}: {causes}")
    return TrainingError(f"Ray Train failed: {_last_line(error)}")


def _did_not_start(resources: Resources) -> UserError:
    """Which resource is taken by others; that the cluster as a whole has enough was seen before, but nodes may go."""
    return busy(resources, missing_resources(resources) or shortage(resources))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
