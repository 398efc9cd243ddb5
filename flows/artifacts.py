"""What a flow leaves in the Prefect UI: the report of each stage, its table and its pictures."""

from __future__ import annotations

import base64
from typing import Any, TypeVar

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from diffusion_core.config import UserError
from diffusion_core.jobs.backend import BackendConfig
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import pipeline, train
from diffusion_core.stages.base import Stage
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.pipeline import PipelineResult
from diffusion_core.store import Directory, layout
from diffusion_core.tracking import resolve_model
from flows import trail
from flows.results import columns, markdown, section, table

ResultT = TypeVar("ResultT", bound=Result)

MAX_PICTURE_BYTES = 1_500_000  # a larger picture is linked to, not embedded: artifacts live in Prefect's database


def publish(stage: Stage[Any, ResultT], request: Request, result: ResultT, backend: BackendConfig) -> ResultT:
    """The report of a stage, as an artifact of the run that calls; returns the result."""
    report = markdown(
        stage.title,
        stage.text and stage.text(result),
        table(stage.rows(result)),
        stage.picture and embedded(stage.picture(result)),
        stage.plot and _drawn(stage.plot(result)),
        section("Trail", table(trail.of_stage(stage, result, request.store, backend))),
    )
    if stage.table:
        create_table_artifact(stage.table(result), key=stage.report, description=report)
    else:
        create_markdown_artifact(report, key=stage.report, description=stage.title)
    return result


def of_pipeline(result: PipelineResult, config: PipelineConfig) -> None:
    """The report of a whole pipeline, section by section."""
    title = f"Pipeline {result.name}"
    report = markdown(
        title,
        table(pipeline.rows(result)),
        section("What changed since the last run", table(list(result.changes.items()))),
        section("Generated images", embedded(result.images.contact_sheet)),
        section("Samples", beside_the_champion(result)),
        section("Training loss", _drawn(train.plot(result.run))),
        section("Trail", columns(trail.of_pipeline(result.stages, result.store, config.backend))),
    )
    create_markdown_artifact(report, key="pipeline", description=title)


def beside_the_champion(result: PipelineResult) -> str:
    """The sample sheet of the version, beside that of the champion that it was compared with, or follows."""
    version = result.version
    title = f"version {version.version}, {version.alias}"
    found = {title: _sheet(result.run.bundle_uri)}
    rival = version.previous if version.promoted else version.figures.get("champion_version")
    if rival is not None:
        title = f"version {rival}, {'champion before' if version.promoted else 'champion'}"
        found[title] = samples_of(version.model, rival, result.store)
    return columns([found])


def samples_of(model: str, version: int, store: str) -> str:
    """The sample sheet of a model version as Markdown, or why there is none."""
    try:
        return _sheet(resolve_model(f"models:/{model}/{version}", store).bundle_uri)
    except UserError as error:
        return f"There is no sample sheet: {error}"


def _sheet(bundle_uri: str) -> str:
    try:
        return embedded(f"{bundle_uri}/{layout.SAMPLES}")
    except FileNotFoundError as error:
        return f"There is no sample sheet: {error}"


def embedded(picture_uri: str) -> str:
    """A PNG of the store as Markdown that needs nothing else to be shown; its address if it is too large for that."""
    parent, _, name = picture_uri.rpartition("/")
    data = Directory(parent).read(name)
    return f"Picture: {picture_uri}" if len(data) > MAX_PICTURE_BYTES else _png(name, data)


def _drawn(plot: bytes | None) -> str | None:
    return _png("plot.png", plot) if plot else None


def _png(name: str, data: bytes) -> str:
    return f"![{name}](data:image/png;base64,{base64.b64encode(data).decode()})"
