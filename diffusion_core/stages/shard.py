"""Source of images → dataset version: Parquet shards with a manifest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from diffusion_core.config import execution
from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, Stage, seconds
from diffusion_core.stages.events import Event

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig


class ShardRequest(Request):
    source: SourceConfig
    dataset: DatasetConfig
    preset: SkipJsonSchema[str | None] = execution(None, description="Preset that this comes from, to be told of.")

    @classmethod
    def of(cls, config: PipelineConfig, preset: str | None = None) -> ShardRequest:
        return cls(
            store=config.store,
            resources=config.resources.shard,
            source=config.source,
            dataset=config.dataset,
            preset=preset,
        )


class ShardResult(Result):
    uri: str = Field(description="URI of the dataset version.")
    version: str
    splits: dict[str, int] = Field(description="Rows of each split.")
    rejected: int = Field(description="Items of the source that were not taken; rejected.parquet says why.")
    shards: int

    @property
    def rows_by_split(self) -> str:
        return ", ".join(f"{rows:,} {split}" for split, rows in self.splits.items())


class ShardOptions(o.Options):
    needs_source: ClassVar[bool] = True

    name: o.Name = None
    source: o.Source = None
    image_size: o.ImageSize = None
    workers: o.Workers = None

    def request(self, config: PipelineConfig) -> ShardRequest:
        return ShardRequest.of(config, self.preset)


def check(request: ShardRequest, backend: BackendConfig) -> None:
    """The source has something to read."""
    from diffusion_core.stages import checks

    checks.check_place(request, "shard", backend, mlflow=False)
    checks.check_source(request.source, request.store)


def run(request: ShardRequest) -> ShardResult:
    """Make the dataset version, or find it. Raises what `work.shard.make_dataset` raises."""
    from diffusion_core.stages.work.shard import make_dataset

    began = time.monotonic()
    dataset, reused = make_dataset(request)
    return ShardResult(
        seconds=time.monotonic() - began,
        reused=reused,
        uri=dataset.uri,
        version=dataset.version,
        splits=dataset.splits,
        rejected=dataset.manifest["rejected"]["rows"],
        shards=len(dataset.manifest["shards"]),
    )


def rows(result: ShardResult) -> Rows:
    return [
        ("dataset version", result.version),
        ("place", result.uri),
        ("rows", result.rows_by_split),
        ("rejected", f"{result.rejected} (rejected.parquet says why)" if result.rejected else "none"),
        ("shards", str(result.shards)),
        ("seconds", seconds(result)),
    ]


def events(request: ShardRequest, result: ShardResult) -> list[Event]:
    name = request.dataset.name
    payload = {
        "dataset": name,
        "preset": request.preset,
        **result.model_dump(include={"version", "uri", "splits", "rejected", "shards"}),
    }
    return [Event("diffusion.dataset.created", name, payload, once=result.version)]


STAGE = Stage(
    name="shard",
    flow="shard-dataset",
    title="Dataset",
    options=ShardOptions,
    request=ShardRequest,
    result=ShardResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
)
