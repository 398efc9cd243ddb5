"""How images are made: a set grows by the range of image ids that is asked for, as far as it lacks them.

A plan row is a shard; each shard commits itself (create-if-absent), so that whatever ends the job, running it again
does only what is missing. Ray Data deals the rows to a pool of actors in blocks. A shard that raises is a row of the
outcome; a shard that takes its whole process down costs its block, and in the next pass every shard that is still
missing is a block of its own, so that the poisonous one is alone with its death.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from diffusion_core.bundle import bundle_digest, read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.generation import tables
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.imageset import ImageSet, describe
from diffusion_core.generation.plan import Extension, Range, Shard, ShardTask
from diffusion_core.jobs.cluster import ray_session, reserved
from diffusion_core.jobs.request import Resources
from diffusion_core.jobs.tally import Tally, tallied
from diffusion_core.progress import Progress
from diffusion_core.stages.work.guide import with_guides_found
from diffusion_core.store import StoreFull, layout
from diffusion_core.store.patience import StoreUnavailable
from diffusion_core.store.turns import one_at_a_time

BLOCKS_PER_WORKER = 8
DIED = "the worker process died while it made this shard (killed, out of memory, or a crash in native code)"

Worker = Callable[[ShardTask, Callable[[int], None]], Callable[[dict[str, Any]], dict[str, Any]]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """The range of image ids [first_image_id, stop) of a set, made as far as it could be.

    `stored` of them are there, `generated` of these are new; `seconds` is what making them took, without Ray's start.
    """

    images: ImageSet
    first_image_id: int
    stop: int
    stored: int
    generated: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.generated / self.seconds if self.generated else 0.0


@dataclass
class _Outcome:
    """What became of the shards that were missing."""

    made: set[Shard] = field(default_factory=set)
    found: set[Shard] = field(default_factory=set)
    failed: dict[Shard, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[Shard, float] = field(default_factory=dict)
    took: float = 0.0


@dataclass(frozen=True)
class _Crew:
    """The workers of a job: their resources, what they are told, and their class if it is not the usual one."""

    resources: Resources
    task: ShardTask
    worker: Worker | None


def generate(
    bundle_uri: str,
    config: GenerationConfig,
    store: str,
    resources: Resources,
    *,
    model_version: str | None = None,
    stage: str = "generate",
    worker: Worker | None = None,
) -> Generated:
    """Make the images that a configuration asks for, and that are not stored yet, into `<store>/images/<set id>`.

    Uses the Ray that is initialised, else starts one for as long as it needs it; needs none (and no torch) if every
    image is there.

    Args:
        model_version: what the commit records call the model; default: the bundle's digest.
        stage: name under which progress is shown.
        worker: class of the workers, for tests; default `generation.worker.ShardWorker`.

    Raises:
        UserError: the configuration does not suit the model, the cluster is too small (nothing is planned then), or
            more shards failed than `max_failed_shards` (what succeeded is committed then).
    """
    config = config.model_copy(update={"guidance": with_guides_found(config.guidance, store)})
    found_digest = bundle_digest(bundle_uri)
    images = describe(store, bundle_uri, found_digest, read_bundle_config(bundle_uri), config)
    wanted, outcome = images.look(config.first_image_id, config.count), _Outcome()
    missing = images.missing(wanted)
    if wanted.gaps or missing:
        device = "cuda" if resources.gpus_per_worker else "cpu"
        task = ShardTask(images.uri, bundle_uri, model_version or found_digest, device, config.guidance.models)
        crew = _Crew(resources, task, worker)
        turn = f"{images.description.set_id}/{wanted.first}-{wanted.stop}"
        with one_at_a_time(store, "generate", turn) as waited:  # for these very ids, not for the next ones after them
            first_image_id = wanted.first if waited else config.first_image_id
            wanted, missing = _make_range(images, first_image_id, config, crew, outcome, stage)
    elif wanted.continues:
        _say_what_continues(images, wanted)
    first, stop, extensions = wanted.first, wanted.stop, wanted.extensions
    complete = [images.finish(extension) for extension in extensions]
    _report_failures(images, missing, outcome, config.max_failed_shards)
    for extension, whole in zip(extensions, complete, strict=True):
        if not whole and first <= extension.first_image_id and extension.stop <= stop:
            _close(images, extension, outcome)
    if not images.directory.exists(layout.SHEET):
        images.draw_sheet()
    stored = stop - first - sum(_within(shard, first, stop) for shard in outcome.failed)
    made = sum(_within(shard, first, stop) for shard in outcome.made)
    return Generated(images, first, stop, stored, made, outcome.took)


def _say_what_continues(images: ImageSet, wanted: Range) -> None:
    """A request that names no ids may have meant new ones."""
    logger.warning(
        "continuing ids %d..%d, which a request of the same count left unfinished; generation.first_image_id = %d asks "
        "for the next ones",
        wanted.first,
        wanted.stop - 1,
        max(stop for _, stop in images.ranges()),
    )


def _make_range(
    images: ImageSet,
    first_image_id: int | None,
    config: GenerationConfig,
    crew: _Crew,
    outcome: _Outcome,
    stage: str,
) -> tuple[Range, list[Shard]]:
    """Plan a range and make what it lacks, and show it; the range, and the shards that it lacked."""
    wanted = images.look(first_image_id, config.count)
    missing = images.missing(wanted)
    if not wanted.gaps and not missing:  # another job has made it meanwhile
        return wanted, missing
    # Room for the workers first, as a request that cannot run must not leave an extension behind.
    with ray_session(), reserved(crew.resources) as options:
        wanted = images.extend(first_image_id, config.count)
        missing = images.missing(wanted)
        if wanted.continues:
            _say_what_continues(images, wanted)
        for extension in wanted.extensions:
            images.write_plan(extension)
        whole = wanted.stop - wanted.first
        already = whole - sum(_within(shard, wanted.first, wanted.stop) for shard in missing)
        making = time.monotonic()
        with Progress(stage, whole, initial=already) as progress, tallied(progress, already) as tally:
            _make(images, missing, outcome, config, crew, options, tally)
            progress.update(whole - sum(_within(shard, wanted.first, wanted.stop) for shard in outcome.failed))
        outcome.took = time.monotonic() - making
    _write_log(images, outcome)
    return wanted, missing


def _make(
    images: ImageSet,
    missing: Sequence[Shard],
    outcome: _Outcome,
    config: GenerationConfig,
    crew: _Crew,
    options: dict[str, Any],
    tally: Tally,
) -> None:
    """Pass after pass over the shards that are still missing, at most 1 + `max_retries` of them.

    Raises:
        StoreFull: as soon as a shard could not be stored for that reason.
    """
    todo = list(missing)
    for attempt in range(1 + config.max_retries):
        share = -(-len(todo) // (BLOCKS_PER_WORKER * crew.resources.workers))
        size = 1 if attempt else min(config.shards_per_block, share)
        if attempt:
            logger.warning("%d shards are tried again", len(todo))
        rows = {}
        with closing(_pass(todo, size, crew, options, tally)) as outcomes:
            for told in outcomes:
                if told.get("store_full"):  # not the shard's fault, and no other shard would fare better
                    raise StoreFull(told["error"])
                rows[told["shard"]] = told
        again = []
        for shard in todo:
            row = rows.get(shard.number)
            if row is None:  # its block was lost; it may have been committed before
                row = {"outcome": "made" if images.record(shard) else "failed", "error": DIED, "final": False}
                row["store_away"] = False
            outcome.seconds[shard] = row.get("seconds", 0.0)
            if row["outcome"] != "failed":
                outcome.failed.pop(shard, None)
                (outcome.made if row["outcome"] == "made" else outcome.found).add(shard)
                continue
            away = row["store_away"]
            outcome.failed[shard] = {"error": row["error"], "attempts": attempt + 1, "store_away": away}
            logger.warning("shard %d failed: %s", shard.number, row["error"])
            if not row["final"]:
                again.append(shard)
        todo = again
        if not todo:
            return


def _pass(
    shards: Sequence[Shard], size: int, crew: _Crew, options: dict[str, Any], tally: Tally
) -> Generator[dict[str, Any]]:
    """One Ray Data execution: the outcome rows of the shards whose blocks survived."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    names = ("shard", "first_image_id", "count")
    values = [dict(zip(names, (shard.number, shard.first_image_id, shard.count), strict=True)) for shard in shards]
    blocks = -(-len(values) // size)
    context = DataContext.get_current().copy()
    context.max_errored_blocks = -1  # a lost block is looked after here, in the next pass
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would log every lost block and its own progress
    # An actor that has used up its restarts stays in Ray Data's pool as a corpse, and a pool of corpses waits for ever.
    # So the finite number that binds is that of the retries of a block; restarts are just more than they can need.
    retries = min(1, crew.resources.max_failures)
    with DataContext.current(context), warnings.catch_warnings():
        # Ray 2.60 deprecates passing these two without offering names for them; the pin holds the minor version.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        # Not from_arrow, which runs a task for each table, and all the job's CPUs are reserved for its workers.
        dataset = ray.data.from_items(values, override_num_blocks=blocks).map(
            _PoolWorker,  # type: ignore[arg-type]  # a class of callables, as Ray Data wants it for actors
            fn_constructor_args=(crew.worker, crew.task, tally),
            compute=ActorPoolStrategy(size=min(crew.resources.workers, blocks), max_tasks_in_flight_per_actor=1),
            max_restarts=blocks * (1 + retries) + crew.resources.max_failures,
            max_task_retries=retries,
            **options,
        )
    try:
        yield from dataset.iter_rows()
    finally:
        tally.dismiss()  # the error of a lost block may hold on to its actor, whose CPU the next pass would wait for


class _PoolWorker:
    """What Ray Data makes in each actor: joins the tally, and makes the worker proper at the first shard.

    The worker's module is imported here and not in the job, which so never has to load torch.
    """

    def __init__(self, make: Worker | None, task: ShardTask, tally: Tally) -> None:
        tally.join()
        self._make, self._task, self._tally = make, task, tally
        self._worker: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._worker is None:
            try:
                from diffusion_core.generation.worker import ShardWorker

                self._worker = (self._make or ShardWorker)(self._task, self._tally)
            except Exception as error:  # a node without torch, say: a row tells more than a lost block
                failed = {"outcome": "failed", "error": repr(error), "final": False, "store_away": False}
                return {**row, **failed, "seconds": 0.0}
        return self._worker(row)


def _report_failures(images: ImageSet, tried: Sequence[Shard], outcome: _Outcome, allowed: int) -> None:
    """`failed.parquet`; raises if there are more failures than allowed, or one for no fault of the shard."""
    if not outcome.failed:
        if tried:
            images.directory.delete(layout.FAILED)
        return
    images.directory.write(layout.FAILED, tables.failures(outcome.failed))
    shard, first = next(iter(outcome.failed.items()))
    sentence = (
        f"{len(outcome.failed)} of {len(tried)} shards failed, for example shard {shard.number} (images "
        f"{shard.first_image_id} to {shard.stop - 1}): {first['error'].rstrip('.')}. All of them stand in "
        f"{images.uri}/{layout.FAILED}. Running the same command again makes only what is missing."
    )
    if any(failed["store_away"] for failed in outcome.failed.values()):
        raise StoreUnavailable(sentence)
    if len(outcome.failed) > allowed:
        raise UserError(f"{sentence} generation.max_failed_shards = {allowed} is the number that may fail.")
    logger.warning(sentence)


def _close(images: ImageSet, extension: Extension, outcome: _Outcome) -> None:
    """Note that an extension was finished with some shards failed, so that later requests go beyond it."""
    failed = [
        shard.number for shard in outcome.failed if extension.first_image_id <= shard.first_image_id < extension.stop
    ]
    if failed:
        images.directory.create_json(extension.closed_key, {"schema_version": 1, "failed_shards": failed})


def _write_log(images: ImageSet, outcome: _Outcome) -> None:
    """Timings of this job, apart from everything that has to be the same whenever it is made."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    shards = [{"shard": shard.number, "seconds": took} for shard, took in sorted(outcome.seconds.items(), key=str)]
    log = {"ended": now, "seconds": outcome.took, "host": os.uname().nodename, "shards": shards}
    images.directory.create_json(layout.set_log(f"{now}-{uuid.uuid4().hex[:8]}"), log)


def _within(shard: Shard, first: int, stop: int) -> int:
    """Images of a shard that belong to [first, stop)."""
    return min(shard.stop, stop) - max(shard.first_image_id, first)
