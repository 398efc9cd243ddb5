"""How images are made: a set grows by the range of image ids that is asked for, as far as it lacks them.

A plan row is a shard; each shard commits itself (create-if-absent), so that whatever ends the job, running it again
does only what is missing. They are dealt to a pool of actors in blocks. A shard that raises is a row of the
outcome; a shard that takes its whole process down costs its block, and in the next pass every shard that is still
missing is a block of its own, so that the poisonous one is alone with its death.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from diffusion_core.bundle import bundle_digest, read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.generation import tables
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.imageset import ImageSet, describe
from diffusion_core.generation.plan import Extension, Range, Shard, ShardOutcome, ShardTask
from diffusion_core.jobs.cluster import metrics
from diffusion_core.jobs.cluster.reserve import reserved
from diffusion_core.jobs.cluster.rows import Pool, one_pass
from diffusion_core.jobs.cluster.session import ray_session
from diffusion_core.jobs.cluster.tally import Tally, tallied
from diffusion_core.jobs.context import about
from diffusion_core.jobs.request import Resources
from diffusion_core.progress import Progress
from diffusion_core.stages.work.guide import with_guides_found
from diffusion_core.store import StoreFull, layout
from diffusion_core.store.patience import StoreUnavailable
from diffusion_core.store.turns import one_at_a_time

BLOCKS_PER_WORKER = 8
DIED = "the worker process died while it made this shard (killed, out of memory, or a crash in native code)"

Worker = Callable[[ShardTask, Callable[[int], None]], Callable[[Shard], ShardOutcome]]

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

    shards: dict[Shard, ShardOutcome] = field(default_factory=dict)
    took: float = 0.0

    def add(self, outcome: ShardOutcome) -> None:
        """The last outcome of a shard is the one that counts."""
        self.shards[outcome.shard] = outcome
        if outcome.outcome == "failed":
            logger.warning("shard %d failed: %s", outcome.shard.number, outcome.error)

    @property
    def made(self) -> list[Shard]:
        return [shard for shard, row in self.shards.items() if row.outcome == "made"]

    @property
    def failed(self) -> dict[Shard, ShardOutcome]:
        return {shard: row for shard, row in self.shards.items() if row.outcome == "failed"}


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
    asked: str | None = None,
    stage: str = "generate",
    worker: Worker | None = None,
) -> Generated:
    """Make the images that a configuration asks for, and that are not stored yet, into `<store>/images/<set id>`.

    Uses the Ray that is initialised, else starts one for as long as it needs it; needs none (and no torch) if every
    image is there.

    Args:
        model_version: what the commit records call the model; default: the bundle's digest.
        asked: who asks for new images (see `generation.plan.look`).
        stage: name under which progress is shown.
        worker: class of the workers, for tests; default `generation.worker.ShardWorker`.

    Raises:
        UserError: the configuration does not suit the model, the cluster is too small (nothing is planned then), or
            more shards failed than `max_failed_shards` (what succeeded is committed then).
    """
    config = config.model_copy(update={"guidance": with_guides_found(config.guidance, store)})
    found_digest = bundle_digest(bundle_uri)
    images = describe(store, bundle_uri, found_digest, read_bundle_config(bundle_uri), config)
    about(set_id=images.description.set_id)
    wanted, outcome = images.look(config.first_image_id, config.count, asked), _Outcome()
    missing = images.missing(wanted)
    if wanted.gaps or missing:
        device = "cuda" if resources.gpus_per_worker else "cpu"
        task = ShardTask(images.uri, bundle_uri, model_version or found_digest, device, config.guidance.models)
        crew = _Crew(resources, task, worker)
        turn = f"{images.description.set_id}/{asked or f'{wanted.first}-{wanted.stop}'}"
        with one_at_a_time(store, "generate", turn) as waited:  # for these very ids, not for the next ones after them
            first_image_id = wanted.first if waited and not asked else config.first_image_id
            wanted, missing = _make_range(images, first_image_id, asked, config, crew, outcome, stage)
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
    asked: str | None,
    config: GenerationConfig,
    crew: _Crew,
    outcome: _Outcome,
    stage: str,
) -> tuple[Range, list[Shard]]:
    """Plan a range and make what it lacks, and show it; the range, and the shards that it lacked."""
    wanted = images.look(first_image_id, config.count, asked)
    missing = images.missing(wanted)
    if not wanted.gaps and not missing:  # another job has made it meanwhile
        return wanted, missing
    # Room for the workers first, as a request that cannot run must not leave an extension behind.
    with ray_session(), reserved(crew.resources) as options:
        wanted = images.extend(first_image_id, config.count, asked)
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
        pool = Pool(tally, 1 if attempt else min(config.shards_per_block, share))
        if attempt:
            metrics.count(metrics.Counter.retries, len(todo))
            logger.warning("%d shards are tried again", len(todo))
        work = _Work(crew.worker, crew.task, tally)
        told = dict[Shard, ShardOutcome]()
        with closing(one_pass(work, dict(enumerate(todo)), crew.resources, options, pool)) as answers:
            for _, answer in answers:
                if answer.store_full:  # not the shard's fault, and no other shard would fare better
                    raise StoreFull(answer.error)
                told[answer.shard] = answer
        for shard in todo:
            if shard not in told:  # its block was lost; it may have been committed before
                made = images.record(shard) is not None
                told[shard] = ShardOutcome(shard, "made") if made else ShardOutcome(shard, "failed", DIED)
            outcome.add(replace(told[shard], attempts=attempt + 1))
        todo = [shard for shard in todo if told[shard].outcome == "failed" and not told[shard].final]
        if not todo:
            return


class _Work:
    """What each actor does with its shards: makes the worker proper at the first of them.

    The worker's module is imported here and not in the job, which so never has to load torch.
    """

    def __init__(self, make: Worker | None, task: ShardTask, tally: Tally) -> None:
        self._make, self._task, self._tally = make, task, tally
        self._worker: Callable[[Shard], ShardOutcome] | None = None

    def __call__(self, shard: Shard) -> ShardOutcome:
        if self._worker is None:
            try:
                from diffusion_core.generation.worker import ShardWorker

                self._worker = (self._make or ShardWorker)(self._task, self._tally)
            except Exception as error:  # a node without torch, say: an outcome tells more than a lost block
                return ShardOutcome(shard, "failed", repr(error))
        return self._worker(shard)


def _report_failures(images: ImageSet, tried: Sequence[Shard], outcome: _Outcome, allowed: int) -> None:
    """`failed.parquet`; raises if there are more failures than allowed, or one for no fault of the shard."""
    if not outcome.failed:
        if tried:
            images.directory.delete(layout.FAILED)
        return
    images.directory.write(layout.FAILED, tables.failures(outcome.failed.values()))
    shard, first = next(iter(outcome.failed.items()))
    sentence = (
        f"{len(outcome.failed)} of {len(tried)} shards failed, for example shard {shard.number} (images "
        f"{shard.first_image_id} to {shard.stop - 1}): {first.error.rstrip('.')}. All of them stand in "
        f"{images.uri}/{layout.FAILED}. Running the same command again makes only what is missing."
    )
    if any(failed.store_away for failed in outcome.failed.values()):
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
    rows = sorted(outcome.shards.values(), key=lambda row: str(row.shard))
    shards = [{"shard": row.shard.number, "seconds": row.seconds} for row in rows]
    log = {"ended": now, "seconds": outcome.took, "host": os.uname().nodename, "shards": shards}
    images.directory.create_json(layout.set_log(f"{now}-{uuid.uuid4().hex[:8]}"), log)


def _within(shard: Shard, first: int, stop: int) -> int:
    """Images of a shard that belong to [first, stop)."""
    return min(shard.stop, stop) - max(shard.first_image_id, first)
