"""Store → a store without what nothing needs, or the list of that."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from diffusion_core.catalog import prune as pruning
from diffusion_core.catalog.prune import Retention, Row
from diffusion_core.config import execution
from diffusion_core.jobs.request import Request, Resources, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, Stage
from diffusion_core.stages.events import Event
from diffusion_core.store import Directory

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig

OLDER_THAN = "7d"


class PruneRequest(Request):
    resources: SkipJsonSchema[Resources] = execution(default_factory=Resources, description="It has no workers.")
    older_than: str = Field(OLDER_THAN, description="Age from which things may go, as 30d or 24h.")
    unused: bool = Field(
        False, description="Also runs, datasets, figures and notes that nothing needs, not only job files."
    )
    apply: bool = Field(False, title="Delete", description="Delete; without it, only say what would go.")

    @property
    def retention(self) -> Retention:
        from diffusion_core.stages.settings import seconds

        return Retention(seconds(self.older_than, "older_than"), self.unused)


class PruneResult(Result):
    deleted: bool = Field(description="True if the candidates were deleted, False if this is only what would go.")
    candidates: list[Row] = Field(description="What goes, and why.")
    kept: list[Row] = Field(description="What stays, and why.")

    @property
    def bytes(self) -> int:
        """Of all that goes."""
        return sum(row.bytes for row in self.candidates)


class PruneOptions(o.Options):
    unread: ClassVar[tuple[str, ...]] = (*o.CONFIGURATION, "backend")

    older_than: Annotated[
        str | None, Field(description=f"Age from which things may go, as 30d or 24h; default: {OLDER_THAN}.")
    ] = None
    unused: Annotated[
        bool, Field(description="Also runs, datasets and figures that nothing needs, not only job files.")
    ] = False
    apply: Annotated[
        bool,
        Field(title="Delete", description="Delete; without it, only say what would go."),
        o.Typed(flags=("--yes",)),
    ] = False

    def request(self, config: PipelineConfig) -> PruneRequest:
        from diffusion_core.stages.settings import seconds

        older_than = self.older_than or OLDER_THAN
        seconds(older_than, "--older-than")
        return PruneRequest(store=config.store, older_than=older_than, unused=self.unused, apply=self.apply)


def check(request: PruneRequest, backend: BackendConfig) -> None:
    """The store is there, and the age is one."""
    from diffusion_core.stages import checks

    checks.check_readable(request.store)
    _ = request.retention


def run(request: PruneRequest) -> PruneResult:
    """Say what goes, or delete it. Raises what `catalog.prune.plan` raises."""
    began = time.monotonic()
    rows = pruning.plan(request.store, request.retention)
    going = [row for row in rows if row.goes]
    found = pruning.apply(request.store, going, request.retention) if request.apply else going
    candidates = [row for row in found if row.goes]
    return PruneResult(
        seconds=time.monotonic() - began,
        reused=not candidates,
        deleted=request.apply,
        candidates=candidates,
        kept=[row for row in [*found, *rows] if not row.goes],
    )


def rows(result: PruneResult) -> Rows:
    done = "deleted" if result.deleted else "would go; --yes deletes it, in a form Delete"
    return [
        *((_size(row.bytes), f"{row.kind} {row.uri}  ({row.why})") for row in result.candidates),
        (_size(result.bytes), f"{done}; {len(result.kept):,} things stay"),
    ]


def _size(count: int) -> str:
    return f"{count / 1e6:10.1f} MB"


def events(request: PruneRequest, result: PruneResult) -> list[Event]:
    if not (result.deleted and result.candidates):
        return []
    payload = {"things": len(result.candidates), "bytes": result.bytes, "older_than": request.older_than}
    return [Event("diffusion.store.pruned", Directory(request.store).name, payload)]


STAGE = Stage(
    name="prune",
    flow="prune-store",
    title="Pruned store",
    options=PruneOptions,
    request=PruneRequest,
    result=PruneResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
    is_job=False,
)
