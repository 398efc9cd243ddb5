"""Finished run → bundle with a moving average of another length, made out of the run's snapshots."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from diffusion_core.config import execution
from diffusion_core.jobs.request import Request, Resources, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, Stage, seconds
from diffusion_core.stages.events import Event

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig

SigmaRel = Annotated[
    float, Field(ge=0.01, le=0.28, title="Width", description="Relative width of the average, 0.01 to 0.28.")
]
ImagesSeen = Annotated[
    int | None, Field(ge=1, title="Images seen", description="At which end of training; default: the last one.")
]


class ExportRequest(Request):
    resources: SkipJsonSchema[Resources] = execution(default_factory=Resources, description="It has no workers.")
    run_uri: str = Field(description="URI of a run that was trained with training.ema=power.")
    sigma_rel: SigmaRel
    images_seen: ImagesSeen = None


class ExportResult(Result):
    bundle_uri: str = Field(description="URI of the exported model bundle.")
    digest: str = Field(description="Digest of the bundle.")
    ema_error: float | None = Field(description="Relative L2 error of the average's profile over time, from 0.")


class ExportOptions(o.Options):
    unread: ClassVar[tuple[str, ...]] = o.CONFIGURATION

    run: Annotated[
        str,
        Field(title="Run", description="Run, by its id or URI, that was trained with training.ema=power."),
        o.Typed(argument=True),
    ]
    sigma_rel: SigmaRel
    images_seen: ImagesSeen = None

    def request(self, config: PipelineConfig) -> ExportRequest:
        from diffusion_core.catalog import find

        uri = find.run(self.run, config.store).uri
        return ExportRequest(store=config.store, run_uri=uri, sigma_rel=self.sigma_rel, images_seen=self.images_seen)


def check(request: ExportRequest, backend: BackendConfig) -> None:
    """The run is there."""
    from diffusion_core.catalog import find
    from diffusion_core.stages import checks

    checks.check_store(request.store)
    checks.check_services(request.store, backend, mlflow=False)
    find.run(request.run_uri, request.store)


def run(request: ExportRequest) -> ExportResult:
    """Make the bundle, or find it. Raises what `training.posthoc.export` raises."""
    from diffusion_core.bundle import bundle_digest, read_bundle_config
    from diffusion_core.store import Directory, layout
    from diffusion_core.training import posthoc
    from diffusion_core.training.run import RunDirectory

    began = time.monotonic()
    place = RunDirectory(Directory(request.run_uri))
    there = {bundle for bundle in (place.directory / layout.BUNDLES).children()}
    uri = posthoc.export(place, request.sigma_rel, request.images_seen)
    return ExportResult(
        seconds=time.monotonic() - began,
        reused=Directory(uri).name in there,
        bundle_uri=uri,
        digest=bundle_digest(uri),
        ema_error=read_bundle_config(uri).ema_error,
    )


def rows(result: ExportResult) -> Rows:
    return [
        ("bundle", result.bundle_uri),
        ("digest", result.digest),
        ("profile", "exact" if result.ema_error is None else f"made with an error of {100 * result.ema_error:.1f} %"),
        ("seconds", seconds(result)),
    ]


def events(request: ExportRequest, result: ExportResult) -> list[Event]:
    payload = result.model_dump(exclude={"reused", "seconds"})
    return [Event("diffusion.bundle.exported", result.digest, payload, once=result.digest)]


STAGE = Stage(
    name="export",
    flow="export-average",
    title="Exported bundle",
    options=ExportOptions,
    request=ExportRequest,
    result=ExportResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
    picture=lambda result: f"{result.bundle_uri}/samples.png",
)
