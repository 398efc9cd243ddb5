"""Schedules as deployments of a Prefect server, in the queues of its work pool.

A schedule is the deployment `<flow>/<name>`, with a limit of one run. Prefect itself skips a run for which there is no
room (CANCEL_NEW) or has it wait (ENQUEUE). It knows no way to cancel the old run, so with `if_running: cancel` a second
deployment, `replace-running/<name>`, has the times, and starts the first one (see `replace`).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from diffusion_core.config import UserError, explain
from diffusion_core.stages import overrides
from diffusion_core.stages.prune import PruneRequest
from diffusion_core.stages.settings import seconds
from diffusion_core.store import Directory
from flows.schedules import runs
from flows.schedules.config import IfRunning, ScheduleConfig, What
from flows.schedules.replace import replace_running
from flows.schedules.watch import watch
from flows.server import prefect_server
from flows.stack.pool import POOL, queue_of
from flows.stages import FLOWS

TAG = "schedule"
FLOW_OF: dict[What, Flow[..., Any]] = {
    What.pipeline: runs.pipeline,
    What.generate: runs.generate,
    What.watch: watch,
    What.prune: FLOWS["prune"],
}


def add(config: ScheduleConfig, store: str) -> dict[str, Any]:
    """Put a schedule on the server, in place of one of the same name; how it stands there.

    Raises:
        UserError: an override names no field, a time is none, or the server lacks the pool.
    """
    store = Directory(store).uri  # no relative path: the runs start elsewhere
    wanted = _deployments(config, store)
    with prefect_server() as client:
        _check_room(client, wanted)
        applied = {wanted_one.apply() for wanted_one in wanted}
        for old in _named(client, config.name):
            if old.id not in applied:
                client.delete_deployment(old.id)
        return _row(client, _named(client, config.name))


def rows() -> list[dict[str, Any]]:
    """All schedules of the server, by name."""
    with prefect_server() as client:
        by_name: dict[str, list[DeploymentResponse]] = {}
        for deployment in _tagged(client):
            by_name.setdefault(deployment.name, []).append(deployment)
        return [_row(client, found) for _, found in sorted(by_name.items())]


def set_active(name: str, active: bool) -> dict[str, Any]:
    """Pause a schedule, or resume it. A paused one starts nothing by itself."""
    with prefect_server() as client:
        for deployment in _existing(client, name):
            for schedule in deployment.schedules:
                client.update_deployment_schedule(deployment.id, schedule.id, active=active)
        return _row(client, _named(client, name))


def remove(name: str) -> dict[str, Any]:
    """Take a schedule off the server; what it has made stays, and a run that is going goes on."""
    with prefect_server() as client:
        found = _existing(client, name)
        row = _row(client, found)
        for deployment in found:
            client.delete_deployment(deployment.id)
        return row


def _deployments(config: ScheduleConfig, store: str) -> list[RunnerDeployment]:
    times = [_times(config)]
    tags = ["diffusion", TAG, f"what:{config.what}", f"if-running:{config.if_running}"]
    replaces = config.if_running is IfRunning.cancel
    main = _deployment(
        FLOW_OF[config.what],
        config,
        parameters=_parameters(config, store),
        tags=tags,
        times=[] if replaces else times,
        strategy=_strategy(config.if_running),
    )
    if not replaces:
        return [main]
    starts = {"deployment": f"{main.flow_name}/{config.name}"}
    front = _deployment(
        replace_running,
        config,
        parameters=starts,
        tags=tags,
        times=times,
        strategy=ConcurrencyLimitStrategy.CANCEL_NEW,
    )
    return [main, front]


def _deployment(
    flow: Flow[..., Any],
    config: ScheduleConfig,
    *,
    parameters: dict[str, Any],
    tags: list[str],
    times: list[Schedule],
    strategy: ConcurrencyLimitStrategy,
) -> RunnerDeployment:
    made = flow.to_deployment(
        name=config.name,
        parameters=parameters,
        tags=tags,
        description=flow.description,
        work_pool_name=POOL,
        work_queue_name=queue_of(flow.name),
        schedules=times,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=strategy),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return cast(RunnerDeployment, made)


def _parameters(config: ScheduleConfig, store: str) -> dict[str, Any]:
    """What the flow is told: nothing that the preset says already. Checked here as the run will check it."""
    if config.what is What.prune:
        return {"request": _prune_request(config, store)}
    fields = overrides.by_path(config.overrides)
    if isinstance(source := fields.get("source.uri"), str):
        fields["source.uri"] = Directory(source).uri
    overrides.resolve(config.preset, fields, store, source_needed=config.what is not What.generate)
    told: dict[str, Any] = {"store": store, "preset": config.preset, "overrides": fields}
    if config.what is What.watch:
        return told | ({} if config.interval_s is None else {"still_s": config.interval_s})
    return told | {"new_images": config.makes_new_images} | ({"model": config.model} if config.model else {})


def _prune_request(config: ScheduleConfig, store: str) -> dict[str, Any]:
    """The request of a prune that deletes, unless the overrides say otherwise."""
    try:
        request = PruneRequest.model_validate({"apply": True, **config.overrides, "store": store})
    except ValidationError as error:
        raise UserError(f"overrides: {explain(error)}") from None
    seconds(request.older_than, "overrides: older_than:")
    return request.model_dump(mode="json", exclude_defaults=True)


def _times(config: ScheduleConfig) -> Schedule:
    if config.cron is None:
        return Interval(timedelta(seconds=config.interval_s or 0), timezone=config.time_zone)
    try:
        CronSchedule(cron=config.cron, timezone=config.time_zone)
    except ValueError:
        raise UserError(
            f"schedule: cron: {config.cron!r} is not accepted: give minute, hour, day, month and weekday, "
            "as '0 2 * * *'."
        ) from None
    return Cron(config.cron, timezone=config.time_zone)


def _strategy(if_running: IfRunning) -> ConcurrencyLimitStrategy:
    return ConcurrencyLimitStrategy.CANCEL_NEW if if_running is IfRunning.skip else ConcurrencyLimitStrategy.ENQUEUE


def _check_room(client: SyncPrefectClient, wanted: list[RunnerDeployment]) -> None:
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        raise UserError(
            f"The Prefect server {client.api_url} has no work pool {POOL}; diffusion stack up makes it."
        ) from None
    for one in wanted:
        try:
            there = client.read_deployment_by_name(f"{one.flow_name}/{one.name}")
        except ObjectNotFound:
            continue
        if TAG not in there.tags:
            raise UserError(f"schedule: name: {one.name} is the name of another deployment; choose one of its own.")


def _tagged(client: SyncPrefectClient) -> list[DeploymentResponse]:
    return client.read_deployments(
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=["diffusion", TAG]))
    )


def _named(client: SyncPrefectClient, name: str) -> list[DeploymentResponse]:
    return [deployment for deployment in _tagged(client) if deployment.name == name]


def _existing(client: SyncPrefectClient, name: str) -> list[DeploymentResponse]:
    if found := _named(client, name):
        return found
    names = ", ".join(sorted({deployment.name for deployment in _tagged(client)})) or "none"
    raise UserError(f"There is no schedule {name}; the schedules are: {names}.")


def _row(client: SyncPrefectClient, deployments: list[DeploymentResponse]) -> dict[str, Any]:
    """A schedule as it stands on the server."""
    timed = next(deployment for deployment in deployments if deployment.schedules)
    told = next(deployment for deployment in deployments if "deployment" not in deployment.parameters)
    (schedule, *_) = timed.schedules
    return {
        "name": told.name,
        "what": _tag(told, "what"),
        "times": _said(schedule.schedule),
        "time_zone": getattr(schedule.schedule, "timezone", None) or "UTC",
        "if_running": _tag(told, "if-running"),
        "active": schedule.active,
        "next": _next(client, timed) if schedule.active else None,
        "parameters": told.parameters,
    }


def _tag(deployment: DeploymentResponse, key: str) -> str:
    return next(tag.removeprefix(f"{key}:") for tag in deployment.tags if tag.startswith(f"{key}:"))


def _said(times: Any) -> str:
    return times.cron if hasattr(times, "cron") else f"every {times.interval.total_seconds():g} s"


def _next(client: SyncPrefectClient, deployment: DeploymentResponse) -> str | None:
    """When it starts next. A schedule that was added a moment ago has no run yet."""
    upcoming = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=1,
    )
    return upcoming[0].expected_start_time.isoformat() if upcoming and upcoming[0].expected_start_time else None
