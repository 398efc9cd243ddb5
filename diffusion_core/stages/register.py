"""Bundle → model version, which becomes the champion if the gate lets it pass."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from diffusion_core.config import digest, execution
from diffusion_core.evaluation.config import EvaluationConfig, GateConfig
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, Stage, seconds
from diffusion_core.stages.events import Event
from diffusion_core.tracking.approval import Question

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig


class RegisterRequest(Request):
    model: str = Field(description="Name of the registered model.")
    bundle_uri: str
    dataset_uri: str
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    mlflow_run_id: SkipJsonSchema[str | None] = execution(
        None, description="MLflow run that trained the bundle; default: its own."
    )

    @classmethod
    def of(
        cls, config: PipelineConfig, model: str, bundle_uri: str, dataset_uri: str, mlflow_run_id: str | None
    ) -> RegisterRequest:
        return cls(
            store=config.store,
            resources=config.resources.evaluate,
            model=model,
            bundle_uri=bundle_uri,
            dataset_uri=dataset_uri,
            evaluation=config.evaluation,
            gate=config.gate,
            mlflow_run_id=mlflow_run_id,
        )


class RegisterResult(Result):
    model: str
    version: int
    promoted: bool = Field(description="True if this version holds the alias champion after the gate.")
    reason: str = Field(description="One sentence: why the gate let it pass, or not.")
    figures: dict[str, Any] = Field(description="The comparison that the gate made.")
    previous: int | None = Field(None, description="The champion before this one, if this one is the champion.")
    question: Question | None = Field(None, description="What a person has to answer before the gate can conclude.")

    @property
    def reference(self) -> str:
        """The version as others are told it."""
        return f"models:/{self.model}/{self.version}"

    @property
    def alias(self) -> str:
        return "champion" if self.promoted else "candidate"


class RegisterOptions(o.Options):
    model: Annotated[str, Field(title="Model", description="Bundle or run to register.")]
    name: o.Name = None
    dataset: o.Dataset = None
    workers: o.Workers = None
    gpus_per_worker: o.Gpus = None

    def request(self, config: PipelineConfig) -> RegisterRequest:
        """Under the name of its dataset, unless another is given."""
        from diffusion_core.catalog import find

        bundle = find.bundle(self.model, config.store)
        name = self.name or self.preset or bundle.config.dataset.name
        dataset_uri = find.dataset(self.dataset or bundle.config.dataset.uri, config.store, "--dataset")
        return RegisterRequest.of(config, name, bundle.uri, dataset_uri, bundle.config.mlflow_run_id)


def check(request: RegisterRequest, backend: BackendConfig) -> None:
    """Bundle and dataset are there and suit each other."""
    from diffusion_core.stages import checks

    evaluation = request.evaluation
    checks.check_measured(request.bundle_uri, request.dataset_uri, evaluation, request, backend, mlflow=True)


def run(request: RegisterRequest) -> RegisterResult:
    """Register the bundle, or find its version, and ask the gate. Raises what `work.gate.register` raises."""
    from diffusion_core.stages.work.gate import register
    from diffusion_core.tracking import champion_before

    began = time.monotonic()
    version, verdict, new = register(request)
    return RegisterResult(
        seconds=time.monotonic() - began,
        reused=not new,
        model=request.model,
        version=version,
        promoted=verdict.passed,
        reason=verdict.reason,
        figures=verdict.figures,
        previous=champion_before(request.store, request.model) if verdict.passed else None,
        question=verdict.question,
    )


def rows(result: RegisterResult) -> Rows:
    return [
        ("model version", result.reference),
        ("alias", result.alias),
        ("gate", result.reason),
        ("seconds", seconds(result)),
    ]


def events(request: RegisterRequest, result: RegisterResult) -> list[Event]:
    """That there is a version, and what became of it: champion, a question, or refused."""
    version = {"model": result.model, "version": result.version, "bundle_uri": request.bundle_uri}
    registered = Event("diffusion.model.registered", result.model, version, once=str(result.version))
    if result.promoted:
        return [registered, champion_changed(result.model, result.version, result.previous, result.reason)]
    payload = {**version, "reason": result.reason, "figures": result.figures}
    if result.question is not None:
        return [registered, Event("diffusion.approval.asked", result.model, payload, once=result.question.id)]
    once = digest(result.version, result.reason)
    return [registered, Event("diffusion.gate.refused", result.model, payload, once=once)]


def champion_changed(model: str, version: int, previous: int | None, reason: str, by_hand: bool = False) -> Event:
    """A version is the champion now; the gate makes it so once, a person any number of times."""
    payload = {"model": model, "version": version, "previous": previous, "reason": reason}
    return Event("diffusion.champion.changed", model, payload, once=f"{version} after {previous}", repeats=by_hand)


STAGE = Stage(
    name="register",
    flow="register-model",
    title="Model version",
    options=RegisterOptions,
    request=RegisterRequest,
    result=RegisterResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
    question=lambda result: result.question,
    mlflow=lambda result: result.reference,
)
