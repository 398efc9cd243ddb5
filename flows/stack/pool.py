"""The work pool of the pipeline: queues of their own for training, for generation and for everything else.

A training of ten hours holds up other trainings, and nothing else. A process pool is used: its worker starts each flow
run as a process of its machine, from the package that is installed there.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_core.config import UserError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.deployments.runner import RunnerDeployment

POOL = "diffusion"
LIMITS = {"training": 1, "generation": 1, "default": 4}
"""Runs at once of each queue, where nothing else is asked for."""
KEPT_TAGS = {"restart-after-crash"}
"""Tags that a user gives to a deployment, and that it keeps when it is registered again."""

_QUEUES = {"diffusion-pipeline": "training", "train-model": "training", "generate-images": "generation"}


def queue_of(flow_name: str) -> str:
    """The queue that runs of a flow wait in."""
    return _QUEUES.get(flow_name, "default")


def limits(texts: list[str]) -> dict[str, int]:
    """Limits as a user writes them, `training=2`; UserError for a queue that does not exist and for no number."""
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in LIMITS or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--limit {text}: give a queue ({', '.join(LIMITS)}) and a number from 1, as training=2.")
        found[name] = int(number)
    return found


def deployments(store: str) -> list[RunnerDeployment]:
    """All deployments of the pipeline, each with pool and queue."""
    from flows import deploy

    found = deploy.deployments(store)
    for deployment in found:
        deployment.work_pool_name = POOL
        deployment.work_queue_name = queue_of(str(deployment.flow_name))
    return found


async def prepare(asked: Mapping[str, int]) -> None:
    """Make the pool and its queues on Prefect's server; of what is there already only what is asked changes."""
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        await _make_pool(client)
        for name, limit in LIMITS.items():
            await _make_queue(client, name, asked.get(name), limit)


async def register(ours: Sequence[RunnerDeployment]) -> None:
    """Register these deployments, or bring them up to date."""
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        tags = {deployment.name: set(deployment.tags) for deployment in await client.read_deployments()}
    for deployment in ours:
        deployment.tags = [*deployment.tags, *sorted(tags.get(deployment.name, set()) & KEPT_TAGS)]
        await deployment.aapply()


def base_job_template() -> dict[str, Any]:
    """How a worker starts a run: with its own interpreter, in the folder that the pool was made from."""
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    variables = template["variables"]["properties"]
    variables["command"]["default"] = shlex.join([sys.executable, "-m", "prefect.engine"])
    variables["working_dir"]["default"] = os.getcwd()  # relative paths mean what they mean in the user's shell
    return template


async def _make_pool(client: PrefectClient) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    template = base_job_template()
    try:
        await client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    except ObjectAlreadyExists:
        await client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


async def _make_queue(client: PrefectClient, name: str, asked: int | None, default: int) -> None:
    from prefect.exceptions import ObjectNotFound

    try:
        queue = await client.read_work_queue_by_name(name, work_pool_name=POOL)
    except ObjectNotFound:
        await client.create_work_queue(name, work_pool_name=POOL, concurrency_limit=asked or default)
        return
    limit = asked or queue.concurrency_limit or default  # the pool comes with a queue `default` that has none
    if limit != queue.concurrency_limit:
        await client.update_work_queue(queue.id, concurrency_limit=limit)
