"""How a run is trained: Ray Train workers that continue it from wherever the store says it is.

A finished run is answered without Ray; a run that another job works on is watched until it ends.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.jobs.account import keeper
from diffusion_core.jobs.cluster.fit import Fit, TrainingError, explained, signals_received
from diffusion_core.jobs.cluster.train_worker import PROGRESS, recorded_error, stop_key, usage_of
from diffusion_core.jobs.context import about, current
from diffusion_core.jobs.record import recorded_mlflow_run
from diffusion_core.jobs.request import Resources
from diffusion_core.progress import Progress
from diffusion_core.stages.train import TrainRequest
from diffusion_core.store.lease import FAILED, Held, Lease, claim
from diffusion_core.store.patience import StoreUnavailable, patience
from diffusion_core.training.run import INTERRUPTED, RunDirectory, TrainOutcome

logger = logging.getLogger(__name__)

STOP_GRACE_S = 20.0  # after the first signal, for the step under way and its checkpoint
_POLL_S = 0.5
_LOOK_PATIENCE_S = 5.0  # seconds for which the main thread may be deaf to signals


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
    from diffusion_core.jobs.cluster.reserve import require_resources
    from diffusion_core.jobs.cluster.session import ray_session

    order = {
        "store": request.store,
        "run_uri": place.directory.uri,
        "spec": request.spec.model_dump(mode="json"),
        "attempt": lease.number,
        "experiment": request.experiment,
        "start": start,
        "asked_by": request.asked_by and request.asked_by.model_dump(),
    }
    try:
        with ray_session(), Progress("train", request.spec.training.target_images, initial=None) as progress:
            require_resources(request.resources)
            fit = Fit(order, request.resources)
            with keeper().reserved_gpus(request.resources.workers * request.resources.gpus_per_worker):
                _follow(fit, place, lease, _Relay(place, lease.number, progress))
            keeper().add(usage_of(place, lease.number, request.resources.workers))
            outcome = _outcome(fit, place, lease, request.resources)
            progress.update(outcome.images_seen, loss=outcome.loss)
            return outcome
    except Exception:
        _record_failure(request, place)
        raise


def _follow(fit: Fit, place: RunDirectory, lease: Lease, show: _Relay) -> None:
    """Show the progress until the workers are done. A signal asks them for a checkpoint, a second ends them at once."""
    with signals_received() as received:
        fit.begin()
        asked_at = 0.0
        while not fit.wait(_POLL_S):
            show()
            about(mlflow_run_id=_recorded_by_now(place))
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


def _recorded_by_now(place: RunDirectory) -> str | None:
    """The MLflow run, for whoever clears up after this job; None before the workers came that far."""
    if "mlflow_run_id" in current().ids:
        return None
    with suppress(StoreUnavailable), patience(_LOOK_PATIENCE_S):
        return recorded_mlflow_run(place)
    return None


def _ask_to_stop(place: RunDirectory, lease: Lease, signum: int) -> None:
    try:
        with patience(_LOOK_PATIENCE_S):
            place.attempts.create_json(stop_key(lease.number), {"signal": signum})
    except StoreUnavailable as error:
        logger.warning("The workers cannot be asked for a checkpoint: %s", error)


def _outcome(fit: Fit, place: RunDirectory, lease: Lease, resources: Resources) -> TrainOutcome:
    if sentence := recorded_error(place, lease.number):
        raise UserError(sentence)
    if fit.error is not None:
        raise explained(fit.error, resources) from fit.error
    outcome = TrainOutcome.model_validate(fit.answer)
    if outcome.stopped == INTERRUPTED:
        raise TrainingError(f"The training was asked to stop, after {outcome.images_seen:,} images.")
    return outcome


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
            if not self._shown:  # what was done before is none of this job's work
                self._progress.update(told.get("began", told["done"]))
            self._shown = told
            self._progress.total = told["total"]
            self._progress.update(told["done"], **told["figures"])
