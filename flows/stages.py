"""The stages as Prefect tasks and flows, made from their registry: `FLOWS`, by the name of the stage.

Each stage finds its own finished work: running a flow again is how anything that broke is mended, and running a
finished one is quick. The work is that of a job, but for stages that say that theirs is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run

from diffusion_core.config import UserError
from diffusion_core.jobs.backend import BackendConfig
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages.events import failed
from diffusion_core.stages.registry import STAGES, Entry
from flows import approval, artifacts, events
from flows.checked import check_unless_done
from flows.flow import diffusion_flow, task_failed
from flows.follow import follow_job


def not_the_users_mistake(_task: Any, _run: Any, state: Any) -> bool:
    """A job that broke is worth another start; a mistake in what was asked stays one however often it is tried."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


@task(
    cache_policy=NO_CACHE,  # whether work is done is the job's to know
    persist_result=False,
    retry_condition_fn=not_the_users_mistake,
)
def _work(stage: str, request: Request, backend: BackendConfig) -> Result | State[Any]:
    asked = STAGES[stage].load()
    try:
        answer = follow_job(asked, request, backend) if asked.is_job else asked.run(request)
        result = artifacts.publish(asked, request, answer, backend)
    except Exception as error:
        events.tell([failed(stage, error, task_run.run_count)], request.store)
        if isinstance(error, UserError):
            return task_failed(error)
        raise
    if asked.events:
        events.tell(asked.events(request, result), request.store)
    return result


def run_stage(stage: str, request: Request, backend: BackendConfig) -> Any:
    """Run a stage as a task of the flow that calls, started again as often as `backend` allows where its job broke.

    If it ends with a question to a person, the flow waits for the answer, and runs it again.
    """
    question = STAGES[stage].load().question
    task = _work.with_options(name=stage, retries=backend.retries, retry_delay_seconds=backend.retry_delay_s)

    def work() -> Any:
        return task(stage, request, backend, return_state=True).result()

    return work() if question is None else approval.decided(work, question, request.store)


def run_checked(stage: str, request: Request, backend: BackendConfig) -> Any:
    """What the flow of a stage does: it looks first at what can go wrong, then runs the stage."""
    check_unless_done(lambda: STAGES[stage].load().check(request, backend))
    return run_stage(stage, request, backend)


def _flow(entry: Entry) -> Flow[..., Any]:
    stage = entry.load()

    def run_job(request: Any, backend: BackendConfig = BackendConfig()) -> Any:  # noqa: B008
        return run_checked(stage.name, request, backend)

    def run_here(request: Any) -> Any:
        return run_checked(stage.name, request, BackendConfig())

    run: Callable[..., Any] = run_job if stage.is_job else run_here
    # From these Prefect makes the form, and finds the flow of a deployment: by this name, in this module.
    run.__annotations__ = {"request": stage.request, "backend": BackendConfig, "return": stage.result}
    run.__name__ = run.__qualname__ = stage.flow.replace("-", "_")
    return diffusion_flow(stage.flow, description=entry.summary)(run)


FLOWS = {name: _flow(entry) for name, entry in STAGES.items()}
globals().update({made.fn.__name__: made for made in FLOWS.values()})
