"""Bundle → figures against held-out real images, with their floor: the same figures of real images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from diffusion_core.config import execution
from diffusion_core.evaluation.config import EvaluationConfig
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, Stage, seconds
from diffusion_core.stages.events import Event

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig


class EvaluateRequest(Request):
    bundle_uri: str
    dataset_uri: str
    evaluation: EvaluationConfig = EvaluationConfig()
    mlflow_run_id: SkipJsonSchema[str | None] = execution(
        None, description="MLflow run to which the figures are attached."
    )

    @classmethod
    def of(
        cls, config: PipelineConfig, bundle_uri: str, dataset_uri: str, mlflow_run_id: str | None
    ) -> EvaluateRequest:
        return cls(
            store=config.store,
            resources=config.resources.evaluate,
            bundle_uri=bundle_uri,
            dataset_uri=dataset_uri,
            evaluation=config.evaluation,
            mlflow_run_id=mlflow_run_id,
        )


class EvaluateResult(Result):
    uri: str = Field(description="URI of the report, evaluation.json.")
    figures: dict[str, float] = Field(description="Figures of the generated images.")
    floor: dict[str, float] = Field(description="The same figures for held-out real images, with equal N.")


class EvaluateOptions(o.Options):
    model: Annotated[
        str, Field(title="Model", description="Model to measure: name@alias, name/version, run or bundle.")
    ]
    dataset: o.Dataset = None
    samples: o.Samples = None
    workers: o.Workers = None
    gpus_per_worker: o.Gpus = None

    def request(self, config: PipelineConfig) -> EvaluateRequest:
        from diffusion_core.catalog import find

        bundle = find.bundle(self.model, config.store)
        dataset_uri = find.dataset(self.dataset or bundle.config.dataset.uri, config.store, "--dataset")
        return EvaluateRequest.of(config, bundle.uri, dataset_uri, bundle.config.mlflow_run_id)


def check(request: EvaluateRequest, backend: BackendConfig) -> None:
    """Bundle, dataset, sampler and guidance suit each other."""
    from diffusion_core.diffusion.config import check_sampler
    from diffusion_core.evaluation.config import check_held_out_figures
    from diffusion_core.stages import checks

    evaluation, mlflow = request.evaluation, request.mlflow_run_id is not None
    bundle = checks.check_measured(request.bundle_uri, request.dataset_uri, evaluation, request, backend, mlflow)
    check_sampler("evaluation.sampler", evaluation.sampler, bundle.process)
    check_held_out_figures("evaluation", evaluation, bundle.process)
    shape, classes = bundle.image_shape, bundle.class_names
    checks.check_guidance("evaluation.guidance", evaluation.guidance, bundle.process, shape, classes, request.store)


def run(request: EvaluateRequest) -> EvaluateResult:
    """Evaluate, and attach the figures to the MLflow run. Raises what `work.evaluate.evaluate` raises."""
    from diffusion_core.stages.work.evaluate import attach, evaluate

    began = time.monotonic()
    done = evaluate(request.store, request.bundle_uri, request.dataset_uri, request.evaluation, request.resources)
    if request.mlflow_run_id:
        attach(request.store, done, request.mlflow_run_id)
    return EvaluateResult(
        seconds=time.monotonic() - began,
        reused=done.reused,
        uri=done.uri,
        figures=done.report["figures"],
        floor=done.report["floor"],
    )


def rows(result: EvaluateResult) -> Rows:
    return [*figure_rows(result), ("report", result.uri), ("seconds", seconds(result))]


def figure_rows(result: EvaluateResult) -> Rows:
    """`kernel_distance -4.4 ± 5.0 (held-out real images: -4.1 ± 4.6)`, a row a figure."""
    lines = []
    for name in result.figures:
        if not name.endswith("_error"):  # of the figure before it, and shown with it
            floor = f" (held-out real images: {amount(result.floor, name)})" if name in result.floor else ""
            lines.append(f"{name} {amount(result.figures, name)}{floor}")
    return [("" if number else "evaluation", line) for number, line in enumerate(lines or ["no figures"])]


def amount(figures: Mapping[str, float], name: str) -> str:
    """A figure, with its standard error if it has one, which then decides how many digits mean anything."""
    value, error = figures[name], figures.get(f"{name}_error")
    if not error:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def table(result: EvaluateResult) -> list[dict[str, Any]]:
    """The figures with their floor."""
    return [
        {"figure": name, "generated": value, "held-out real images (floor)": result.floor.get(name)}
        for name, value in result.figures.items()
    ]


def events(request: EvaluateRequest, result: EvaluateResult) -> list[Event]:
    evaluation = result.uri.split("/")[-2]
    asked = {"bundle_uri": request.bundle_uri, "dataset_uri": request.dataset_uri}
    payload = {**asked, **result.model_dump(exclude={"reused", "seconds"})}
    return [Event("diffusion.evaluation.completed", evaluation, payload, once=evaluation)]


STAGE = Stage(
    name="evaluate",
    flow="evaluate-model",
    title="Evaluation",
    options=EvaluateOptions,
    request=EvaluateRequest,
    result=EvaluateResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
    table=table,
)
