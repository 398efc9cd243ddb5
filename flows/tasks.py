"""The stages of the flows as Prefect tasks: each runs one job and leaves its result in the Prefect UI."""

from __future__ import annotations

from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from diffusion_core.config import UserError
from diffusion_core.jobs import requests as r
from diffusion_core.jobs.backend import BackendConfig
from flows import artifacts
from flows.stage import run_stage

RequestT = TypeVar("RequestT", bound=r.Request)
ResultT = TypeVar("ResultT", bound=r.Result)


class Stages:
    """The stages, run where a configuration says, with as many new starts of a job that broke as it allows."""

    def __init__(self, backend: BackendConfig) -> None:
        self._backend = backend

    def shard(self, request: r.ShardRequest) -> r.ShardResult:
        """Source → dataset version."""
        return self._run(_shard, request)

    def train(self, request: r.TrainRequest) -> r.TrainResult:
        """Dataset version → trained bundle."""
        return self._run(_train, request)

    def evaluate(self, request: r.EvaluateRequest) -> r.EvaluateResult:
        """Bundle → figures, with their floor."""
        return self._run(_evaluate, request)

    def compare(self, request: r.CompareRequest) -> r.CompareResult:
        """Bundle → table and plot of its samplers."""
        return self._run(_compare, request)

    def register(self, request: r.RegisterRequest) -> r.RegisterResult:
        """Bundle → model version, champion if the gate lets it pass."""
        return self._run(_register, request)

    def generate(self, request: r.GenerateRequest) -> r.GenerateResult:
        """Model version → image set."""
        return self._run(_generate, request)

    def _run(self, stage: Task[[RequestT, BackendConfig], ResultT], request: RequestT) -> ResultT:
        backend = self._backend
        again = stage.with_options(retries=backend.retries, retry_delay_seconds=backend.retry_delay_s)
        return again(request, backend)


def not_the_users_mistake(_task: Any, _run: Any, state: Any) -> bool:
    """A job that broke is worth another start; a mistake in what was asked stays one however often it is tried."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,  # whether work is done is the job's to know
    "persist_result": False,
    "retry_condition_fn": not_the_users_mistake,
}


@task(name="shard", **_OPTIONS)
def _shard(request: r.ShardRequest, backend: BackendConfig) -> r.ShardResult:
    return artifacts.of_dataset(run_stage("shard", request, r.ShardResult, backend))


@task(name="train", **_OPTIONS)
def _train(request: r.TrainRequest, backend: BackendConfig) -> r.TrainResult:
    return artifacts.of_run(run_stage("train", request, r.TrainResult, backend))


@task(name="evaluate", **_OPTIONS)
def _evaluate(request: r.EvaluateRequest, backend: BackendConfig) -> r.EvaluateResult:
    return artifacts.of_evaluation(run_stage("evaluate", request, r.EvaluateResult, backend))


@task(name="compare", **_OPTIONS)
def _compare(request: r.CompareRequest, backend: BackendConfig) -> r.CompareResult:
    return artifacts.of_comparison(run_stage("compare", request, r.CompareResult, backend))


@task(name="register", **_OPTIONS)
def _register(request: r.RegisterRequest, backend: BackendConfig) -> r.RegisterResult:
    return artifacts.of_version(run_stage("register", request, r.RegisterResult, backend))


@task(name="generate", **_OPTIONS)
def _generate(request: r.GenerateRequest, backend: BackendConfig) -> r.GenerateResult:
    return artifacts.of_images(run_stage("generate", request, r.GenerateResult, backend))
