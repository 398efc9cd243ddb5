"""What a flow leaves in the Prefect UI: the report of each stage, its table and its picture."""

from __future__ import annotations

import base64
from typing import Any, TypeVar

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from diffusion_core.config import UserError
from diffusion_core.jobs.request import Result
from diffusion_core.stages import pipeline
from diffusion_core.stages.base import Stage
from diffusion_core.stages.pipeline import PipelineResult
from diffusion_core.store import Directory, layout
from diffusion_core.tracking import resolve_model
from flows import results

ResultT = TypeVar("ResultT", bound=Result)

MAX_PICTURE_BYTES = 1_500_000  # a larger picture is linked to, not embedded: artifacts live in Prefect's database


def publish(stage: Stage[Any, ResultT], result: ResultT) -> ResultT:
    """The report of a stage, as an artifact of the run that calls; returns the result."""
    text = stage.text(result) if stage.text else ""
    report = results.markdown(stage.title, text, stage.rows(result), stage.picture and embedded(stage.picture(result)))
    if stage.table:
        create_table_artifact(stage.table(result), key=stage.report, description=report)
    else:
        create_markdown_artifact(report, key=stage.report, description=stage.title)
    return result


def of_pipeline(result: PipelineResult) -> None:
    """The report of a whole pipeline."""
    title = f"Pipeline {result.name}"
    report = results.markdown(title, "", pipeline.rows(result), embedded(result.images.contact_sheet))
    create_markdown_artifact(report, key="pipeline", description=title)


def samples_of(model: str, version: int, store: str) -> str:
    """The sample sheet of a model version as Markdown, or why there is none."""
    try:
        return embedded(f"{resolve_model(f'models:/{model}/{version}', store).bundle_uri}/{layout.SAMPLES}")
    except (UserError, FileNotFoundError) as error:
        return f"There is no sample sheet: {error}"


def embedded(picture_uri: str) -> str:
    """A PNG of the store as Markdown that needs nothing else to be shown; its address if it is too large for that."""
    parent, _, name = picture_uri.rpartition("/")
    data = Directory(parent).read(name)
    if len(data) > MAX_PICTURE_BYTES:
        return f"Picture: {picture_uri}"
    return f"![{name}](data:image/png;base64,{base64.b64encode(data).decode()})"
