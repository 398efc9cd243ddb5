"""What a flow leaves in the Prefect UI: tables of results, figures with their floor, the contact sheet."""

from __future__ import annotations

import base64
from typing import TypeVar

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from diffusion_core.bundle import SAMPLES
from diffusion_core.config import UserError
from diffusion_core.jobs.requests import (
    CompareResult,
    EvaluateResult,
    GenerateResult,
    RegisterResult,
    ShardResult,
    TrainResult,
)
from diffusion_core.storage import Directory
from diffusion_core.tracking import resolve_model
from flows import results
from flows.results import PipelineResult, Rows

ResultT = TypeVar("ResultT")

MAX_PICTURE_BYTES = 1_500_000  # a larger picture is linked to, not embedded: artifacts live in Prefect's database


def of_dataset(result: ShardResult) -> ShardResult:
    return _table(result, "dataset", "Dataset version", results.shard_rows(result))


def of_run(result: TrainResult) -> TrainResult:
    return _table(result, "run", "Training run", results.train_rows(result), f"{result.bundle_uri}/samples.png")


def of_evaluation(result: EvaluateResult) -> EvaluateResult:
    create_table_artifact(
        results.figure_table(result), key="evaluation", description=f"Figures with their floor; report: {result.uri}"
    )
    return result


def of_comparison(result: CompareResult) -> CompareResult:
    text = f"## Samplers compared\n\n{results.comparison_text(result)}\n\n{embedded(result.picture)}"
    create_markdown_artifact(text, key="comparison", description="Sample quality against network evaluations")
    return result


def of_version(result: RegisterResult) -> RegisterResult:
    return _table(result, "model-version", "Model version", results.register_rows(result))


def of_images(result: GenerateResult) -> GenerateResult:
    return _table(result, "image-set", "Image set", results.generate_rows(result), result.contact_sheet)


def of_pipeline(result: PipelineResult) -> PipelineResult:
    rows = results.pipeline_rows(result)
    return _table(result, "pipeline", f"Pipeline {result.name}", rows, result.images.contact_sheet)


def _table(result: ResultT, key: str, title: str, rows: Rows, picture: str | None = None) -> ResultT:
    text = results.markdown(rows, title)
    if picture:
        text += f"\n\n{embedded(picture)}"
    create_markdown_artifact(text, key=key, description=title)
    return result


def samples_of(model: str, version: int, store: str) -> str:
    """The sample sheet of a model version as Markdown, or why there is none."""
    try:
        return embedded(f"{resolve_model(f'models:/{model}/{version}', store).bundle_uri}/{SAMPLES}")
    except (UserError, FileNotFoundError) as error:
        return f"There is no sample sheet: {error}"


def embedded(picture_uri: str) -> str:
    """A PNG of the store as Markdown that needs nothing else to be shown; its address if it is too large for that."""
    parent, _, name = picture_uri.rpartition("/")
    data = Directory(parent).read(name)
    if len(data) > MAX_PICTURE_BYTES:
        return f"Picture: {picture_uri}"
    return f"![{name}](data:image/png;base64,{base64.b64encode(data).decode()})"
