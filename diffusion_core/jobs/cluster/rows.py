"""Work for the cluster, row by row, with Ray Data: a row whose process dies is tried again a finite number of times.

`one_pass` is the engine: one execution, in which the rows whose process died are simply not among the answers. Who has
typed outcomes of its own looks after the missing rows itself; `on_cluster` tries them again.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from diffusion_core.config import UserError
from diffusion_core.jobs.account import keeper, measured
from diffusion_core.jobs.cluster import metrics
from diffusion_core.jobs.cluster.reserve import reserved
from diffusion_core.jobs.cluster.tally import Tally
from diffusion_core.jobs.request import Resources

Row = TypeVar("Row")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class WorkersDied(UserError):
    """`places` are those of the rows whose process died at every attempt."""

    def __init__(self, places: Sequence[int], rows: int, attempts: int) -> None:
        super().__init__(
            f"{len(places)} of {rows} parts of the work could not be done: at each of {attempts} attempts the worker "
            "process died (killed, out of memory, or a crash in native code). If memory is short, lower "
            "resources.workers."
        )
        self.places = list(places)


@dataclass(frozen=True)
class Pool:
    """Actors that keep what they have loaded, and are dealt several rows at a time; a death loses those of a block.

    tally: what the actors join, so that they can be ended with the pass.
    """

    tally: Tally
    rows_per_block: int = 1


def on_cluster(
    work: Callable[[Row], Answer], rows: Sequence[Row], resources: Resources
) -> Generator[tuple[int, Answer]]:
    """Apply `work` to every row in tasks; yield the place of the row and the result as they come.

    Rows whose process died are tried again when all others are done, at most `resources.max_failures` times.

    Raises:
        UserError: no worker could start in time.
        WorkersDied: at the end, if rows are left.
        Exception: the first that `work` raises, of its own type, with the worker's traceback as a note.
    """
    left = list(range(len(rows)))
    attempts = 1 + resources.max_failures
    with reserved(resources) as options:
        for attempt in range(attempts):
            if attempt:
                metrics.count(metrics.Counter.retries, len(left))
                log.warning("The processes of %d parts of the work died; these are tried again.", len(left))
            done = set()
            with closing(one_pass(work, {place: rows[place] for place in left}, resources, options)) as answers:
                for place, answer in answers:
                    done.add(place)
                    yield place, answer
            left = [place for place in left if place not in done]
            if not left:
                return
    raise WorkersDied(left, len(rows), attempts)


def survives(work: Callable[..., Any], resources: Resources, *arguments: Any) -> bool:
    """Whether a process of the cluster lives through a call, which is tried once.

    Raises:
        Exception: what the call raises.
    """
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    # Without retries of Ray's own: what is killed for its memory would be retried for ever.
    try:
        with reserved(resources) as options:
            ray.get(ray.remote(max_retries=0, **options)(work).remote(*arguments))
    except RayTaskError as error:
        raise error.cause from None
    except (WorkerCrashedError, OutOfMemoryError, NodeDiedError):
        return False
    return True


def one_pass(
    work: Callable[[Row], Answer],
    rows: Mapping[int, Row],
    resources: Resources,
    options: dict[str, Any],
    pool: Pool | None = None,
) -> Generator[tuple[int, Answer]]:
    """One Ray Data execution over rows by place; those whose process dies are not among the answers.

    Rows and answers travel as Ray carries arguments and results, pickled between processes of this job; nothing of it
    is stored.

    Args:
        options: from `reserved`: Ray's options for each worker.
        pool: work in actors, of which each has its own copy of `work`; default: in tasks.

    Raises:
        Exception: the first that `work` raises, of its own type, with the worker's traceback as a note.
    """
    import ray
    from ray import cloudpickle
    from ray.data import DataContext

    items = [{"item": cloudpickle.dumps(item)} for item in rows.items()]
    blocks = -(-len(items) // (pool.rows_per_block if pool else 1))
    how = _in_actors(work, pool, blocks, resources) if pool else _in_tasks(work, blocks, resources)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it would log every lost row with a traceback of its own
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a lost row is looked after by the caller
    with DataContext.current(context), warnings.catch_warnings():
        # Ray Data retries for ever unless told otherwise, and this deprecated way is the only one to tell it.
        warnings.simplefilter("ignore")
        # Not from_arrow, which runs a task for each table, and all the job's CPUs are reserved for its workers.
        data = ray.data.from_items(items, override_num_blocks=blocks).map(**how, **options)
    try:
        # Left to the garbage collector, an unfinished execution would wake Ray up again after its shutdown.
        with closing(cast("Generator[dict[str, bytes]]", iter(data.iter_rows()))) as answers:
            left = len(items)
            metrics.show(metrics.Gauge.queue_length, left)
            for answer in answers:
                place, result, error, usage = cloudpickle.loads(answer["answer"])
                keeper().add(usage)
                if error is not None:
                    raise error
                left -= 1
                metrics.count(metrics.Counter.shards)
                metrics.show(metrics.Gauge.queue_length, left)
                yield place, result
    finally:
        if pool:  # the error of a lost block may hold on to its actor, whose CPU the next pass would wait for
            pool.tally.dismiss()


def _in_tasks(work: Callable[[Any], Any], blocks: int, resources: Resources) -> dict[str, Any]:
    from ray.data import TaskPoolStrategy

    def answer(item: dict[str, bytes]) -> dict[str, bytes]:
        return _answer(work, item)

    return {"fn": answer, "compute": TaskPoolStrategy(size=min(resources.workers, blocks)), "max_retries": 0}


def _in_actors(work: Callable[[Any], Any], pool: Pool, blocks: int, resources: Resources) -> dict[str, Any]:
    """An actor without restarts left stays in Ray Data's pool as a corpse, and a pool of corpses waits for ever.

    So the finite number that binds is that of the retries of a block; restarts are just more than they can need.
    """
    from ray.data import ActorPoolStrategy

    retries = min(1, resources.max_failures)
    return {
        "fn": _Member,
        "fn_constructor_args": (work, pool.tally),
        "compute": ActorPoolStrategy(size=min(resources.workers, blocks), max_tasks_in_flight_per_actor=1),
        "max_restarts": blocks * (1 + retries) + resources.max_failures,
        "max_task_retries": retries,
    }


class _Member:
    """One actor of a pool."""

    def __init__(self, work: Callable[[Any], Any], tally: Tally) -> None:
        tally.join()
        self._work = work

    def __call__(self, item: dict[str, bytes]) -> dict[str, bytes]:
        return _answer(self._work, item)


def _answer(work: Callable[[Any], Any], item: dict[str, bytes]) -> dict[str, bytes]:
    """The place of a row, its result or error, and what it took: raised, an error could not be told from a death."""
    from ray import cloudpickle

    place, row = cloudpickle.loads(item["item"])

    def tried() -> tuple[int, Any, Exception | None]:
        try:
            return place, work(row), None
        except Exception as error:
            error.add_note(f"In the worker:\n{traceback.format_exc()}")
            return place, None, error

    answer, usage = measured(tried)
    return {"answer": cloudpickle.dumps((*answer, usage))}
