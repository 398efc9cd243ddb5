"""The flow that a schedule with `if_running: cancel` starts: it cancels the last run, and then starts the next one.

It has a place of its own, beside the queue of the runs: in that queue the next run might wait behind the very one that
it is to replace.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling

from flows.flow import diffusion_flow

PATIENCE_S, POLL_S = 90.0, 2.0
_STARTED = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING, StateType.PAUSED)


@diffusion_flow("replace-running", persist_result=False)
def replace_running(deployment: str) -> None:
    """Cancel what runs of a deployment, wait until it has ended, and start it anew.

    If the end takes long, the new run is started all the same: the deployment's limit of one has it wait.
    """
    log = get_run_logger()
    with get_client(sync_client=True) as client:
        target = client.read_deployment_by_name(deployment).id
        for run in _runs(client, target, *_STARTED, StateType.SCHEDULED):
            if run.expected_start_time and run.expected_start_time > datetime.now(UTC):
                continue  # somebody asked for it, for later
            log.info("%s is cancelled, as it is time for the next one", run.name)
            _cancel(client, run)
        deadline = time.monotonic() + PATIENCE_S
        while _runs(client, target, *_STARTED) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        new = client.create_flow_run_from_deployment(target, idempotency_key=str(flow_run.id))
    log.info("%s is started", new.name)


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    """One that has not begun is cancelled at once; the worker ends one that runs."""
    begun = run.state is not None and not run.state.is_scheduled()
    reason = "Replaced by the next run of its schedule."
    client.set_flow_run_state(run.id, Cancelling(message=reason) if begun else Cancelled(message=reason))


def _runs(client: SyncPrefectClient, deployment: UUID, *states: StateType) -> list[FlowRun]:
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))),
    )
