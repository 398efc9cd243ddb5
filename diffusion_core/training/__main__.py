"""Train on a machine with torch and little else: no Ray, no MLflow, no flows.

    python -m diffusion_core.training request.json
    torchrun --nproc-per-node 2 -m diffusion_core.training request.json

The request is that of the train job (`store`, `dataset_uri`, `process`, `network`, `training`; `resources` and
`experiment` are passed over), and the run's directory is the same as on a cluster. SIGINT and SIGTERM save a checkpoint
and end it; the same command continues.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from diffusion_core.config import UserError, explain
from diffusion_core.lease import Held, Lease, acquire
from diffusion_core.progress import Progress, parse_progress
from diffusion_core.training.run import INTERRUPTED, RunDirectory, TrainOutcome, TrainSpec, open_run

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
logger = logging.getLogger("diffusion_core.training")


def main() -> int:
    """Train what the request in argv[1] says; 0, 2 (the user can mend it) or 130 (interrupted)."""
    leads = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if leads else logging.WARNING, format="%(levelname)s: %(message)s")
    if len(sys.argv) != 2:
        print("usage: python -m diffusion_core.training <request.json>", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        store, spec = read_request(sys.argv[1])
        run = open_run(store, spec)
        outcome = run.finished(spec.training) or _train(spec, run)
    except (UserError, ValidationError) as error:
        if leads:
            print(f"train: {explain(error) if isinstance(error, ValidationError) else error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if leads:
        answer = {"run_id": run.run_id, "run_uri": run.directory.uri, **outcome.model_dump(mode="json")}
        print(json.dumps({**answer, "bundle_uri": run.bundle(outcome.images_seen).uri}, indent=2))
    return EXIT_INTERRUPTED if outcome.stopped == INTERRUPTED else 0


def read_request(path: str) -> tuple[str, TrainSpec]:
    """The store and the training of a request file; what only the job needs is left out."""
    try:
        request = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"The request {path} cannot be read: {error}.") from error
    if not isinstance(request, dict) or not isinstance(request.get("store"), str):
        raise UserError(f"The request {path} must be a JSON object with a store.")
    store = request.pop("store")
    return store, TrainSpec.model_validate(
        {name: value for name, value in request.items() if name not in ("resources", "experiment")}
    )


def _train(spec: TrainSpec, run: RunDirectory) -> TrainOutcome:
    from diffusion_core.training.loop import LOST, train
    from diffusion_core.training.world import World

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: _note(signals, received, frame))
    world = World.from_environment()
    lease = acquire(run.attempts, {"kind": "training"}, on_wait=_say_once()) if world.leads else None
    world.from_leader([1.0])  # nobody looks for checkpoints before the leader holds the run
    outcome = "failed"
    try:
        with Progress("train", spec.training.target_images, write=_show if world.leads else _hide) as progress:
            should_stop = _StopAsked(signals, lease, LOST)
            result = train(spec, run, world, None, progress, should_stop, start=spec.training.init_from)
        outcome = "ok"
        return result
    finally:
        if lease is not None:
            lease.end(outcome)
        world.leave()


class _StopAsked:
    """Asks for the end after a signal, or when the lease is lost (looked at every few seconds)."""

    def __init__(self, signals: list[int], lease: Lease | None, lost: str) -> None:
        self._signals, self._lease, self._lost, self._looked_at = signals, lease, lost, 0.0

    def __call__(self) -> str | None:
        import time

        if self._signals:
            return INTERRUPTED
        if self._lease is not None and time.monotonic() - self._looked_at > 5:
            self._looked_at = time.monotonic()
            if not self._lease.still_mine():
                return self._lost
        return None


def _note(signals: list[int], received: int, frame: FrameType | None) -> None:
    signals.append(received)
    if len(signals) > 2:  # torchrun and a shell may each send the first
        raise KeyboardInterrupt


def _say_once() -> Any:
    said: list[int] = []

    def say(held: Held) -> None:
        if held.number not in said:
            said.append(held.number)
            logger.info("Attempt %d is at work on this run (%s); waiting for it.", held.number, held.owner.get("host"))

    return say


def _show(line: str) -> None:
    event = parse_progress(line)
    print(event.sentence() if event else line, flush=True)


def _hide(line: str) -> None:
    """Of all processes one reports."""


if __name__ == "__main__":
    sys.exit(main())
