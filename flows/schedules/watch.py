"""The flow that looks at a source now and then: what is new in it makes a new dataset version, and nothing else does.

A look lists names, sizes and stamps. Only when these differ from the last time is anything read, and only when they
have stayed as they are for a while, so that no file is taken while it is still being written. The content decides then:
a file that was merely touched makes no new version; one that was deleted does, as one that was added. What was seen
stands in `<store>/watched/<dataset>.json`.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

from prefect import get_run_logger
from pydantic import Field

from diffusion_core.config import Config, UserError, digest
from diffusion_core.data.config import SourceKind
from diffusion_core.data.sources.listing import list_files, suffix
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.overrides import resolve
from diffusion_core.stages.shard import ShardRequest, ShardResult
from diffusion_core.store import Directory, layout
from flows.flow import diffusion_flow
from flows.schedules.runs import Fields, Preset, Store
from flows.stages import run_checked

UNFINISHED = frozenset({".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".download"})
JITTER_S = 5.0  # by which two looks may be closer than the interval between them


class Listing(Config):
    """What a look at a source saw."""

    digest: str = Field(description="Digest of all names, sizes and stamps.")
    files: int
    bytes: int
    since: float = Field(description="Unix time at which it was seen so for the first time.")


class Seen(Config):
    """What is known of a watched source."""

    schema_version: int = 1
    listing: Listing | None = Field(None, description="What the last look saw.")
    taken: str | None = Field(None, description="Digest of the listing that the version was made of.")
    version: str | None = Field(None, description="URI of the dataset version that was made or found last.")
    made: float | None = Field(None, description="Unix time at which that was.")


@diffusion_flow("watch-source", persist_result=False)
def watch(
    store: Store,
    preset: Preset = None,
    overrides: Fields = "",
    still_s: Annotated[float, Field(ge=0, description="Seconds for which nothing may change before it is taken.")] = 60,
) -> str:
    """Make a dataset version of a source if its content has changed; one sentence about what was found."""
    config = resolve(preset, overrides, store)
    if config.source.kind is SourceKind.DIGITS:
        raise UserError("source.kind: the bundled digits never change; give source.uri, the folder or prefix to watch.")
    place, key = Directory(store), layout.watched(config.dataset.name)
    seen = Seen.model_validate(place.read_json(key)) if place.exists(key) else Seen()
    now, said = look(config, seen, time.time(), still_s)
    if said is None:
        now, said = _take(config, now, preset)
    if now != seen:
        place.write_json(key, now.model_dump(mode="json"))
    get_run_logger().info(said)
    return said


def look(config: PipelineConfig, seen: Seen, now: float, still_s: float) -> tuple[Seen, str | None]:
    """What is known after a look, and why nothing is to be done; None if there is something to take."""
    listing = _list(str(config.source.uri), config.store, now)
    before = seen.listing
    if before and before.digest == listing.digest:
        listing = before
    after = seen.model_copy(update={"listing": listing})
    shown = f"{listing.files:,} files with {listing.bytes:,} bytes"
    if listing.digest == seen.taken:
        return after, f"Nothing changed since {_date(seen.made or now)}: {shown}."
    if not listing.files:
        return after, f"There is nothing in {config.source.uri} yet."
    if now - listing.since < still_s - JITTER_S:
        return after, f"Something changed in {config.source.uri}, now {shown}; it is taken once it stays so."
    return after, None


def _list(uri: str, store: str, now: float) -> Listing:
    files = [file for file in list_files(uri, store)[1] if suffix(file.key) not in UNFINISHED]
    told = digest([[file.key, file.size, file.stamp] for file in files])
    return Listing(digest=told, files=len(files), bytes=sum(file.size for file in files), since=now)


def _take(config: PipelineConfig, seen: Seen, preset: str | None) -> tuple[Seen, str]:
    """Make the version of what is there, or find that it is an old one."""
    assert seen.listing is not None
    request = ShardRequest.of(config, preset)
    result: ShardResult = run_checked("shard", request, config.backend)
    taken = seen.model_copy(update={"taken": seen.listing.digest, "version": result.uri, "made": time.time()})
    if result.uri == seen.version:
        return taken, f"Files were touched, but their content is that of {result.uri}."
    return taken, f"New dataset version {result.uri}."


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
