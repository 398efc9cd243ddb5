"""Train on a machine with torch and little else: no Ray, no MLflow, no flows.

    python -m diffusion_core.training request.json
    torchrun --nproc-per-node 2 -m diffusion_core.training request.json

The request is that of the train stage (`store` and `spec`; the rest is passed over), and the run's directory is that of
a cluster too. SIGINT and SIGTERM save a checkpoint and end it; the same command continues.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from diffusion_core.config import UserError, explain
from diffusion_core.progress import Progress, parse_progress
from diffusion_core.store.lease import FAILED, OK, Held, Lease, acquire
from diffusion_core.store.patience import EXIT_STORE_AWAY, StoreUnavailable, patience
from diffusion_core.training.run import INTERRUPTED, RunDirectory, TrainOutcome, TrainSpec, open_run

if TYPE_CHECKING:
    from diffusion_core.training.world import World

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
_LOOK_S = 5.0
logger = logging.getLogger("diffusion_core.training")


def main() -> int:
    """Train what the request in argv[1] says; 0, 1 (it broke), 2 (the user can mend it), 75 (the store was away) or 130
    (interrupted)."""
    leads = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if leads else logging.WARNING, format="%(levelname)s: %(message)s")
    if len(sys.argv) != 2:
        print("usage: python -m diffusion_core.training <request.json>", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        store, spec = read_request(sys.argv[1])
        run = open_run(store, spec)
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        outcome = (run.finished(spec.training) if alone else None) or _train(spec, run)
    except (UserError, ValidationError) as error:
        if leads:
            print(f"train: {explain(error) if isinstance(error, ValidationError) else error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except StoreUnavailable as error:
        print(f"train: {error} The same command continues.", file=sys.stderr)
        return EXIT_STORE_AWAY
    if outcome is None:
        return 0
    if leads:
        answer = {"run_id": run.run_id, "run_uri": run.directory.uri, **outcome.model_dump(mode="json")}
        print(json.dumps({**answer, "bundle_uri": run.bundle(outcome.images_seen).uri}, indent=2))
    return EXIT_INTERRUPTED if outcome.stopped == INTERRUPTED else 0


def read_request(path: str) -> tuple[str, TrainSpec]:
    """The store and the training of a request file; what only the job needs is left out.

    Older requests have the fields of `spec` beside `store`.
    """
    try:
        request = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"The request {path} cannot be read: {error}.") from error
    if not isinstance(request, dict) or not isinstance(request.get("store"), str):
        raise UserError(f"The request {path} must be a JSON object with a store.")
    older = {name: value for name, value in request.items() if name not in ("store", "resources", "experiment")}
    return request["store"], TrainSpec.model_validate(request.get("spec", older))


def _train(spec: TrainSpec, run: RunDirectory) -> TrainOutcome | None:
    """The outcome of a run that is trained now, or that was finished; then the leader alone tells it."""
    from diffusion_core.training.loop import LOST, train
    from diffusion_core.training.world import World

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: _note(signals, received, frame))
    world = World.from_environment()
    lease, ended = None, FAILED
    try:
        is_finished, lease = take_run(run, spec, world)
        if is_finished:
            outcome = run.finished(spec.training) if world.leads else None
        else:
            write = _show if world.leads else _hide
            with Progress("train", spec.training.target_images, initial=None, write=write) as progress:
                should_stop = _StopAsked(signals, lease, LOST)
                outcome = train(spec, run, world, None, progress, should_stop, start=spec.training.init_from)
        ended = OK
        return outcome
    finally:
        if lease is not None:
            lease.end(ended)
        world.leave()


def take_run(run: RunDirectory, spec: TrainSpec, world: World) -> tuple[bool, Lease | None]:
    """Whether the run is finished, and the lease of it, which the leader takes for all processes if it is not.

    The leader alone looks, and tells the others at every poll that it still waits, as no exchange between processes may
    last as long as another attempt trains.
    """
    waits, trains, is_finished = range(3)
    say = _say_once()

    def wait_on(held: Held) -> None:
        say(held)
        world.from_leader([waits])

    if not world.leads:
        while (decided := world.from_leader([waits])[0]) == waits:
            pass
        return decided == is_finished, None
    done, lease = run.finished(spec.training) is not None, None
    if not done:
        lease = acquire(run.attempts, {"kind": "training"}, on_wait=wait_on)
        done = run.finished(spec.training) is not None  # by the attempt that it waited for
    world.from_leader([is_finished if done else trains])
    return done, lease


class _StopAsked:
    """Asks for the end when the lease is lost (looked at every few seconds), or after a signal."""

    def __init__(self, signals: list[int], lease: Lease | None, lost: str) -> None:
        self._signals, self._lease, self._lost, self._looked_at = signals, lease, lost, 0.0
        self._is_lost = False

    def __call__(self) -> str | None:
        if self._lease is not None and not self._is_lost and time.monotonic() - self._looked_at > _LOOK_S:
            try:
                with patience(_LOOK_S):
                    self._is_lost = not self._lease.still_mine()
            except StoreUnavailable as error:  # whether it can be done without, the next checkpoint decides
                logger.warning("%s", error)
            self._looked_at = time.monotonic()
        if self._is_lost:
            return self._lost
        return INTERRUPTED if self._signals else None


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
