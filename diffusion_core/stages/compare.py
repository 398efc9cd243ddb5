"""Bundle → samplers compared: quality of the images against network evaluations, as a table and a plot."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from diffusion_core.evaluation.comparison import Comparison
from diffusion_core.evaluation.comparison import table as table_of
from diffusion_core.evaluation.config import ComparisonConfig, EvaluationConfig
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, Stage, seconds
from diffusion_core.stages.events import Event

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig

logger = logging.getLogger(__name__)


class CompareRequest(Request):
    bundle_uri: str
    dataset_uri: str
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="How images are measured.")
    comparison: ComparisonConfig = ComparisonConfig()


class CompareResult(Result):
    uri: str = Field(description="URI of the report, comparison.json.")
    table: str = Field(description="URI of the table, comparison.md.")
    picture: str = Field(description="URI of the plot, comparison.png.")
    cells: int = Field(description="Contestants times seeds.")
    made: int = Field(description="Cells that this job made; the others were found done.")
    comparison: Comparison


class CompareOptions(o.Options):
    model: Annotated[str, Field(title="Model", description="Model whose samplers compete: name@alias, run or bundle.")]
    dataset: o.Dataset = None
    sampler: Annotated[
        tuple[str, ...],
        Field(title="Samplers", description="A sampler to compare, as dpmpp_2m:10; each of several."),
        # A preset's reference and candidate are among its own contestants.
        o.Typed(
            "comparison.contestants", resets=("comparison.reference", "comparison.candidate"), metavar="KIND:STEPS"
        ),
    ] = ()
    reference: Annotated[
        str | None,
        Field(title="Reference", description="The one that the others are measured against, as ddpm:250."),
        o.Typed("comparison.reference"),
    ] = None
    candidate: Annotated[
        str | None,
        Field(title="Candidate", description="The one that is to be as good as the reference, as dpmpp_2m:10."),
        o.Typed("comparison.candidate"),
    ] = None
    seeds: Annotated[
        int | None,
        Field(title="Seeds", description="Sets of images of each sampler."),
        o.Typed("comparison.seeds", metavar="N"),
    ] = None
    images: Annotated[
        int | None,
        Field(title="Images a set", description="Images of each set."),
        o.Typed("comparison.images", metavar="N"),
    ] = None
    guidance: Annotated[
        float | None,
        Field(title="Guidance scale", description="Guidance scale of all samplers; 1 is neutral."),
        o.Typed("comparison.guidance.scale", metavar="N"),
    ] = None
    workers: o.Workers = None
    gpus_per_worker: o.Gpus = None

    def request(self, config: PipelineConfig) -> CompareRequest:
        from diffusion_core.catalog import find

        bundle = find.bundle(self.model, config.store)
        return CompareRequest(
            store=config.store,
            resources=config.resources.evaluate,
            bundle_uri=bundle.uri,
            dataset_uri=find.dataset(self.dataset or bundle.config.dataset.uri, config.store, "--dataset"),
            evaluation=config.evaluation,
            comparison=config.comparison,
        )


def check(request: CompareRequest, backend: BackendConfig) -> None:
    """Every contestant suits the bundle, and the bundle the dataset."""
    from diffusion_core.evaluation.comparison import check_contestants
    from diffusion_core.stages import checks

    evaluation, comparison = request.evaluation, request.comparison
    bundle = checks.check_measured(request.bundle_uri, request.dataset_uri, evaluation, request, backend, mlflow=False)
    shape, classes = bundle.image_shape, bundle.class_names
    check_contestants(comparison, bundle.process, classes)
    for contestant in comparison.contestants:
        field, guidance = f"{contestant.label}: guidance", comparison.guidance_of(contestant)
        checks.check_guidance(field, guidance, bundle.process, shape, classes, request.store)


def run(request: CompareRequest) -> CompareResult:
    """Make the cells that are missing, and the table and the plot. Raises what `work.compare.compare` raises."""
    from diffusion_core.stages.work.compare import PICTURE, RECORD, REPORT, TABLE, compare

    began = time.monotonic()
    view, made = compare(request)
    found = Comparison.model_validate(RECORD.read(view))
    if found.verdict:
        logger.info(found.verdict.sentence)
    return CompareResult(
        seconds=time.monotonic() - began,
        reused=made == 0,
        uri=f"{view.uri}/{REPORT}",
        table=f"{view.uri}/{TABLE}",
        picture=f"{view.uri}/{PICTURE}",
        cells=len(request.comparison.contestants) * request.comparison.seeds,
        made=made,
        comparison=found,
    )


def text(result: CompareResult) -> str:
    """The table, and the candidate's verdict below it."""
    verdict = result.comparison.verdict
    return table_of(result.comparison) + (f"\n\n{verdict.sentence}" if verdict else "")


def rows(result: CompareResult) -> Rows:
    found = result.comparison
    return [
        ("samples", f"{found.images:,} images for each of {len(found.seeds)} seeds; means ± standard errors"),
        ("cells", f"{result.cells:,}, {result.made:,} new"),
        ("table", result.table),
        ("plot", result.picture),
        ("report", result.uri),
        ("seconds", seconds(result)),
    ]


def events(request: CompareRequest, result: CompareResult) -> list[Event]:
    comparison, verdict = result.uri.split("/")[-2], result.comparison.verdict
    payload = {
        "bundle_uri": request.bundle_uri,
        **result.model_dump(include={"uri", "table", "picture", "cells"}),
        "verdict": verdict and verdict.sentence,
    }
    return [Event("diffusion.samplers.compared", comparison, payload, once=result.uri)]


STAGE = Stage(
    name="compare",
    flow="compare-samplers",
    title="Comparison",
    options=CompareOptions,
    request=CompareRequest,
    result=CompareResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
    text=text,
    picture=lambda result: result.picture,
)
