"""Work for the cluster, row by row: a row whose process dies is tried again a finite number of times."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, cast

from diffusion_core.config import UserError
from diffusion_core.jobs.cluster import reserved
from diffusion_core.jobs.request import Resources

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


def on_cluster(
    work: Callable[[dict[str, Any]], Any], rows: Sequence[dict[str, Any]], resources: Resources
) -> Generator[tuple[int, Any]]:
    """Apply `work` to every row with Ray Data; yield the place of the row and the result as they come.

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
                log.warning("The processes of %d parts of the work died; these are tried again.", len(left))
            done = set()
            with closing(_pass(work, {place: rows[place] for place in left}, resources.workers, options)) as answers:
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


def _pass(
    work: Callable[[dict[str, Any]], Any], rows: dict[int, dict[str, Any]], workers: int, options: dict[str, Any]
) -> Generator[tuple[int, Any]]:
    """One Ray Data execution over rows by place; those whose process dies are simply not among the answers.

    Answers travel as Ray carries arguments and results, pickled between processes of this job; nothing of it is stored.
    """
    import ray
    from ray import cloudpickle

    def careful(block: dict[str, Any]) -> dict[str, bytes]:
        try:
            return {"answer": cloudpickle.dumps((block["place"], work(block["row"]), None))}
        except Exception as error:  # raised by Ray Data it could not be told from a death
            error.add_note(f"In the worker:\n{traceback.format_exc()}")
            return {"answer": cloudpickle.dumps((block["place"], None, error))}

    items = [{"place": place, "row": row} for place, row in rows.items()]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it would log every lost row with a traceback of its own
    with warnings.catch_warnings():
        # Ray Data retries for ever unless told otherwise, and this deprecated way is the only one to tell it.
        warnings.simplefilter("ignore")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_errored_blocks = -1  # a lost row is looked after by the caller
        data = ray.data.from_items(items, override_num_blocks=len(items)).map(
            careful,
            compute=ray.data.TaskPoolStrategy(size=min(workers, len(items))),
            max_retries=0,
            **options,
        )
    # Left to the garbage collector, an unfinished execution would wake Ray up again after its shutdown.
    with closing(cast("Generator[dict[str, bytes]]", iter(data.iter_rows()))) as answers:
        for answer in answers:
            place, result, error = cloudpickle.loads(answer["answer"])
            if error is not None:
                raise error
            yield place, result
