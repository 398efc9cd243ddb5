"""The final state of runs whose process is gone: no run stays Running, Cancelling, Pending or Paused for ever.

A flow run that is killed cannot say so. Its worker would, while it lives; without the worker nobody does. So each run
announces its process (`flows.announced`), and `settle` gives a run whose process is dead the state that it should have:
Cancelled if it was being cancelled, Crashed otherwise. A run that is cancelled and goes on, because the worker that
should end it is gone, is ended here. Runs that nobody has picked up yet are left alone, and so are suspended ones, which
wait.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from flows import announced, processes
from flows.stack.services import Service

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

CANCEL_PATIENCE_S = 45.0  # of a living worker, which kills a cancelled run after 30 s itself
SILENCE_S = {
    "PENDING": 60.0,
    "CANCELLING": 30.0,
}  # that a run without a worker may be in a state before it says who it is
ANNOUNCED_AFTER_S = 5.0  # until a run that is tried again has named its new process
RESTART, RESTARTS, RESTARTED_AS, MAX_RESTARTS = "restart-after-crash", "diffusion.restarts", "diffusion.restarted-as", 3

logger = logging.getLogger(__name__)


def settle(client: SyncPrefectClient, worker: Service | None) -> list[FlowRun]:
    """Give every run whose process is dead its final state, and start those again that ask for it.

    Args:
        client: of the server whose runs are looked at.
        worker: the worker that runs the server's deployments on this machine, None if there is none.

    Returns:
        The runs that were given a state, as they were before.
    """
    active = [run for run in _active(client) if announced.is_of_this_machine(run)]
    _end_processes([run for run in active if _is_cancelled_in_vain(run, worker)])
    settled = [run for run in active if _is_dead(run, worker) and _conclude(client, run, _reason(run))]
    _restart_crashed(client)
    return settled


def going(client: SyncPrefectClient) -> list[FlowRun]:
    """The runs that a worker of this machine has taken and that have not ended."""
    return [run for run in _active(client) if announced.is_of_this_machine(run) and announced.WORKER in run.labels]


def take_down(client: SyncPrefectClient, found: list[FlowRun]) -> None:
    """End these runs with their processes, as when the stack goes down."""
    _end_processes(found)
    for run in found:
        _conclude(client, run, "The stack was taken down while this run was going.")
    _restart_crashed(client)


def _active(client: SyncPrefectClient) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    types = [StateType.RUNNING, StateType.CANCELLING, StateType.PENDING, StateType.PAUSED]
    of_types = FlowRunFilterState(type=FlowRunFilterStateType(any_=types))
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=of_types))
    return [run for run in found if run.state_name != "Suspended"]


def _is_dead(run: FlowRun, worker: Service | None) -> bool:
    state = _state(run).type
    process = announced.process_of(run) if state != "PENDING" else None  # that of an earlier attempt
    if process:
        return not process.alive and (state != "RUNNING" or _age(run) > ANNOUNCED_AFTER_S)
    if _has(worker, run) and not _is_cancelled_in_vain(run, worker):
        return False  # it reports a process that it cannot start, or that ends
    return _age(run) > SILENCE_S.get(state, math.inf)


def _is_cancelled_in_vain(run: FlowRun, worker: Service | None) -> bool:
    if _state(run).type != "CANCELLING":
        return False
    return not _has(worker, run) or _age(run) > CANCEL_PATIENCE_S


def _has(worker: Service | None, run: FlowRun) -> bool:
    """Whether the worker lives and is the one that took the run."""
    if worker is None or not worker.alive or announced.WORKER not in run.labels:
        return False
    taken = run.start_time or _state(run).timestamp
    return taken.timestamp() >= worker.since


def _end_processes(found: Iterable[FlowRun]) -> None:
    """SIGTERM, on which a run ends its job in good order, and SIGKILL for whom that takes too long; all at once."""
    ours = [process for run in found if (process := announced.process_of(run))]
    if ours:
        with ThreadPoolExecutor(len(ours)) as pool:
            list(pool.map(processes.end, ours))


def _reason(run: FlowRun) -> str:
    if _state(run).type == "CANCELLING":
        return "The run was cancelled, and its process is gone."
    process = announced.process_of(run)
    if process is None or _state(run).type == "PENDING":
        return "The worker that took this run ended before the run began."
    return f"The process of this run (pid {process.pid}) ended without a word: it was killed, or the machine went down."


def _conclude(client: SyncPrefectClient, run: FlowRun, reason: str) -> bool:
    """Set the final state, unless the run has reached one by itself; whether it was set."""
    from prefect.states import Cancelled, Crashed

    now = _state(client.read_flow_run(run.id))
    cancelled = _state(run).type == "CANCELLING"
    if now.is_final() and (now.type != "CRASHED" or now.message == reason):
        return False
    state: State[Any] = Cancelled(message=reason) if cancelled else Crashed(message=reason)
    client.set_flow_run_state(run.id, state, force=True)
    logger.warning("%s is %s: %s", run.name, state.name, reason)
    return True


def _restart_crashed(client: SyncPrefectClient) -> None:
    """Of each crashed run with the tag, a new one with the same parameters: once, and not for ever."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    asked = {"tags": {"all_": [RESTART]}, "state": {"type": {"any_": ["CRASHED"]}}}
    latest = FlowRunSort.EXPECTED_START_TIME_DESC
    for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(asked), sort=latest):
        restarts = int(run.labels.get(RESTARTS, 0))
        if run.deployment_id is None or RESTARTED_AS in run.labels or restarts >= MAX_RESTARTS:
            continue
        again = client.create_flow_run_from_deployment(
            run.deployment_id,
            parameters=run.parameters,
            tags=run.tags,
            labels={RESTARTS: restarts + 1},
            idempotency_key=f"after-{run.id}",
        )
        client.update_flow_run_labels(run.id, {RESTARTED_AS: str(again.id)})
        logger.info("%s starts again as %s", run.name, again.name)


def _state(run: FlowRun) -> Any:
    assert run.state is not None  # every run of a server has one
    return run.state


def _age(run: FlowRun) -> float:
    return time.time() - float(_state(run).timestamp.timestamp())
