"""How a run is trained: Ray Train workers that continue it from wherever the store says it is.

Ray's own checkpoint manager is given nothing to manage: progress is what `<run>/checkpoints` holds. When a worker dies,
Ray starts the group again inside the same attempt, and the group finds the newest checkpoint there, as a later attempt
would. A finished run is answered without Ray; a run that another job works on is watched until it ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.jobs.record import recorded_mlflow_run
from diffusion_core.jobs.request import Resources
from diffusion_core.jobs.train_worker import PROGRESS, recorded_error, stop_key, work
from diffusion_core.progress import Progress
from diffusion_core.stages.train import TrainRequest
from diffusion_core.store.lease import FAILED, Held, Lease, claim
from diffusion_core.store.patience import StoreUnavailable, patience
from diffusion_core.training.run import INTERRUPTED, RunDirectory, TrainOutcome

logger = logging.getLogger(__name__)

STOP_GRACE_S = 20.0  # after the first signal, for the step under way and its checkpoint
_POLL_S = 0.5
_LOOK_PATIENCE_S = 5.0  # seconds for which the main thread may be deaf to signals
_START_TRIES = 2  # of the worker group, each with an equal share of resources.start_timeout_s
_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class TrainingError(RuntimeError):
    """The workers failed more often than resources.max_failures allows."""


def train_or_watch(request: TrainRequest, place: RunDirectory, start: str | None) -> tuple[TrainOutcome, bool]:
    """Train a run until it is long enough, or watch the job that does.

    Args:
        start: URI of the bundle to start from, if any.

    Returns:
        The outcome, and whether another job made it.

    Raises:
        UserError: the loss is not finite any more, or the cluster is too small.
        TrainingError: workers died too often.
    """
    held: Held | None = None
    training = request.spec.training
    while True:
        got = claim(place.attempts, {"kind": "train job"}, after=held)
        if isinstance(got, Lease):
            with got:
                done = place.finished(training)  # by another, since the last look
                return (done, True) if done else (_train(request, place, start, got), False)
        held = got
        logger.info("Attempt %d trains this run already (%s); watching it.", held.number, held.owner.get("host"))
        with Progress("train", training.target_images, initial=None) as progress:
            show = _Relay(place, held.number, progress)
            held.wait(_POLL_S, show)
        if done := place.finished(training):
            return done, True
        if sentence := recorded_error(place, held.number):
            raise UserError(sentence)


def _train(request: TrainRequest, place: RunDirectory, start: str | None, lease: Lease) -> TrainOutcome:
    """One attempt, with Ray."""
    from diffusion_core.jobs.cluster import ray_session, require_resources

    order = {
        "store": request.store,
        "run_uri": place.directory.uri,
        "spec": request.spec.model_dump(mode="json"),
        "attempt": lease.number,
        "experiment": request.experiment,
        "start": start,
    }
    try:
        with ray_session(), Progress("train", request.spec.training.target_images, initial=None) as progress:
            require_resources(request.resources)
            fit = _Fit(order, request.resources)
            _follow(fit, place, lease, _Relay(place, lease.number, progress))
            outcome = _outcome(fit, place, lease, request.resources)
            progress.update(outcome.images_seen, loss=outcome.loss)
            return outcome
    except Exception:
        _record_failure(request, place)
        raise


def _follow(fit: _Fit, place: RunDirectory, lease: Lease, show: _Relay) -> None:
    """Show the progress until the workers are done. A signal asks them for a checkpoint, a second ends them at once."""
    with _signals() as received:
        fit.begin()
        asked_at = 0.0
        while not fit.wait(_POLL_S):
            show()
            if received and not asked_at:
                logger.warning("Stopping after the next checkpoint; once more, or %g s, to stop now.", STOP_GRACE_S)
                asked_at = time.monotonic()
                _ask_to_stop(place, lease, received[0])
            if len(received) > 1 or (asked_at and time.monotonic() - asked_at > STOP_GRACE_S):
                break
        show()
    if received:
        lease.end(FAILED)
        raise SystemExit(128 + received[0])


def _ask_to_stop(place: RunDirectory, lease: Lease, signum: int) -> None:
    try:
        with patience(_LOOK_PATIENCE_S):
            place.attempts.create_json(stop_key(lease.number), {"signal": signum})
    except StoreUnavailable as error:
        logger.warning("The workers cannot be asked for a checkpoint: %s", error)


def _outcome(fit: _Fit, place: RunDirectory, lease: Lease, resources: Resources) -> TrainOutcome:
    if sentence := recorded_error(place, lease.number):
        raise UserError(sentence)
    if fit.error is not None:
        raise _explained(fit.error, resources) from fit.error
    outcome = TrainOutcome.model_validate(fit.answer)
    if outcome.stopped == INTERRUPTED:
        raise TrainingError(f"The training was asked to stop, after {outcome.images_seen:,} images.")
    return outcome


def _explained(error: BaseException, resources: Resources) -> Exception:
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
    from diffusion_core.jobs.cluster import busy, missing_resources, shortage

    return busy(resources, missing_resources(resources) or shortage(resources))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _record_failure(request: TrainRequest, place: RunDirectory) -> None:
    """Tell MLflow that the run failed, if it came that far; the failure itself is what the user must see."""
    mlflow_run_id = recorded_mlflow_run(place)
    if mlflow_run_id is None:
        return
    from diffusion_core.tracking import RunRecorder

    try:
        RunRecorder(request.store, request.experiment, place.run_id, mlflow_run_id=mlflow_run_id).finish("FAILED")
    except Exception:
        logger.warning("MLflow was not told that the run failed.", exc_info=True)


class _Relay:
    """Shows the progress that the leader of an attempt writes into the run's directory."""

    def __init__(self, place: RunDirectory, attempt: int, progress: Progress) -> None:
        self._place, self._attempt, self._progress = place, attempt, progress
        self._shown: dict[str, Any] = {}

    def __call__(self) -> None:
        try:
            with patience(_LOOK_PATIENCE_S):
                told = self._place.directory.read_json(PROGRESS)
        except (FileNotFoundError, StoreUnavailable):  # the workers may do without the store for longer
            return
        if told["attempt"] == self._attempt and told != self._shown:
            self._shown = told
            self._progress.total = told["total"]
            self._progress.update(told["done"], **told["figures"])


class _Fit:
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
def _signals() -> Iterator[list[int]]:
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
