"""How a source of images becomes a dataset version.

Pass 1 hashes the source and finds the version's name. If that version exists, nothing else happens and Ray is not even
imported. Pass 2 makes the shards with Ray Data, one row of work for each shard: a worker reads the items of its shard
in their final order, so that nothing but a shard's number travels between workers and memory does not grow with the
source. Each finished shard is committed by a record, which the next attempt finds. An image that takes the process of
its worker down, however often that is tried, is found and rejected.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from diffusion_core.config import digest, identity
from diffusion_core.data.hashing import HashCache, Hashed, dataset_version, digests_of, hash_files
from diffusion_core.data.sharding import (
    KILLED,
    Plan,
    Rejected,
    ShardSpan,
    ShardWork,
    check_rejected,
    check_reused,
    finished_shards,
    make_plan,
    make_shard,
    try_images,
)
from diffusion_core.data.shards import ImageDataset, commit_dataset, open_dataset
from diffusion_core.data.sources import Scan, Source, open_source
from diffusion_core.data.sources.hashed import SourceChanged
from diffusion_core.data.sources.listing import SourceFile
from diffusion_core.data.spool import positions_of_items, spool_chunk, spool_chunks
from diffusion_core.jobs.cluster import metrics
from diffusion_core.jobs.cluster.rows import WorkersDied, on_cluster, survives
from diffusion_core.jobs.cluster.session import ray_session
from diffusion_core.jobs.context import about
from diffusion_core.jobs.request import Resources
from diffusion_core.progress import Progress
from diffusion_core.stages.shard import ShardRequest
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import StoreUnavailable
from diffusion_core.store.turns import one_at_a_time

HASH_HERE_BYTES, HASH_HERE_FILES = 2 << 30, 20_000  # more than that is hashed by the cluster
_FILES_A_TASK = 500

log = logging.getLogger(__name__)


def make_dataset(request: ShardRequest) -> tuple[ImageDataset, bool]:
    """Make the dataset version that the request describes, or find it.

    Returns:
        The dataset version, and whether it was found.

    Raises:
        UserError: the source is absent, empty, not what it is said to be, changes meanwhile, or too much of it had to
            be rejected.
    """
    source = open_source(request.source, request.store)
    source.limit(request.dataset.max_file_mb << 20)
    home = Directory(request.store) / layout.dataset(request.dataset.name)
    cache = HashCache(home, source.config.uri or source.kind.value)
    with ExitStack() as cluster:
        digests = digests_of(source, cache, partial(_hash, source, request.resources, cluster))
        cache.save()
        version = dataset_version(source, digests, request.dataset)
        about(dataset=f"{request.dataset.name}@{version}")
        directory = home / version
        reused = directory.exists(layout.MANIFEST)
        if not reused:
            cluster.enter_context(one_at_a_time(request.store, "shard", f"{request.dataset.name}/{version}"))
            reused = directory.exists(layout.MANIFEST)  # another job may have made it meanwhile
        try:
            dataset = open_dataset(directory) if reused else _make(request, source, digests, directory, cluster)
        except SourceChanged as error:
            cache.forget(error.key)  # if size and stamp are the old ones, only hashing again finds the change
            cache.save()
            raise
    if reused:
        check_reused(dataset, request.dataset)
    if layout.WORK in directory.children():
        with suppress(OSError, StoreUnavailable):  # another job at the same version may be clearing up too
            (directory / layout.WORK).delete_tree()
    return dataset, reused


def _hash(source: Source, resources: Resources, cluster: ExitStack, files: list[SourceFile]) -> Iterator[Hashed]:
    """Hash files in this process, or on the cluster if they are many."""
    here = len(files) <= HASH_HERE_FILES and sum(file.size for file in files) <= HASH_HERE_BYTES
    with Progress("hash", len(files), "files") as progress:
        for hashed in hash_files(source, files) if here else _hash_on_cluster(source, resources, cluster, files):
            progress.advance()
            yield hashed


def _hash_on_cluster(
    source: Source, resources: Resources, cluster: ExitStack, files: list[SourceFile]
) -> Generator[Hashed]:
    kind, config, place = type(source), source.config, source.place

    def hash_some(row: dict[str, Any]) -> list[Hashed]:
        some = [SourceFile(key, size) for key, size in json.loads(row["files"])]
        return list(hash_files(kind(config, place, some), some))

    parts = [files[first : first + _FILES_A_TASK] for first in range(0, len(files), _FILES_A_TASK)]
    rows = [{"files": json.dumps([(file.key, file.size) for file in part])} for part in parts]
    cluster.enter_context(ray_session())
    with closing(on_cluster(hash_some, rows, resources)) as answers:
        for _, hashed in answers:
            yield from hashed


def _make(
    request: ShardRequest, source: Source, digests: dict[str, str], directory: Directory, cluster: ExitStack
) -> ImageDataset:
    """Pass 2: make the shards that are missing, judge the rejects, and commit."""
    config = request.dataset
    scan = source.scan(digests)
    total = len(scan.candidates) + scan.rejected_images

    def judge(in_shards: Sequence[Rejected]) -> None:
        rejected = [*scan.rejected, *in_shards]
        check_rejected(directory, rejected, scan.rejected_images + len(in_shards), total, config)

    judge([])
    plan = make_plan(directory, scan, config)
    records = finished_shards(plan)
    if records:
        log.info("%d of %d shards are already finished.", len(records), len(plan.shards))
    try:
        if len(records) < len(plan.shards):
            cluster.enter_context(ray_session())
            plan = _spooled(plan, sum(file.size for file in source.files), request.resources)
            _make_shards(plan, records, request.resources, judge)
    except Exception:
        if directory.exists(layout.MANIFEST):  # another job was at the same version, finished first, and cleared up
            return open_dataset(directory)
        raise
    in_shards = _rejected_in(records)
    judge(in_shards)
    metrics.count(metrics.Counter.rejected, len(scan.rejected) + len(in_shards))
    return commit_dataset(
        directory,
        version=directory.name,
        image_shape=plan.image_shape,
        class_names=scan.class_names,
        shards=[records[index]["shard"] for index in range(len(plan.shards))],
        rejected=[*scan.rejected, *in_shards],
        has_text=scan.has_text,
        source=_about_source(source, scan, digests),
        config=identity(config),
        software={name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pyarrow")},
    )


def _make_shards(
    plan: Plan, records: dict[int, ShardWork], resources: Resources, judge: Callable[[Sequence[Rejected]], None]
) -> None:
    """Make the shards that have no record yet, and add theirs.

    Where the process of a shard died at every attempt, the images that kill it are found and left out.

    Args:
        judge: told the rejects of all shards so far; raises if they are too many.
    """
    missing = [index for index in range(len(plan.shards)) if index not in records]
    try:
        _make_some(plan, missing, frozenset(), records, resources)
    except WorkersDied as died:
        lost = [missing[place] for place in died.places]
        alone = resources.model_copy(update={"workers": 1})  # beside others, an innocent image might lack memory
        killers = set()
        rejected = _rejected_in(records)
        for position in _killers(plan, [plan.shards[index] for index in lost], alone):
            killers.add(position)
            rejected.append((plan.key(position), KILLED))
            log.warning("%s: %s.", *rejected[-1])
            judge(rejected)
        _make_some(plan, lost, frozenset(killers), records, alone)


def _make_some(
    plan: Plan, indices: Sequence[int], killers: frozenset[int], records: dict[int, ShardWork], resources: Resources
) -> None:
    import ray

    shared = ray.put(plan)

    def make(row: dict[str, Any]) -> ShardWork:
        return make_shard(ray.get(shared), row["index"], killers)

    done = sum(plan.shards[index].images for index in records)
    rows = [{"index": index} for index in indices]
    with (
        Progress("shard", len(plan.order), "images", initial=done) as progress,
        closing(on_cluster(make, rows, resources)) as made,
    ):
        for place, record in made:
            records[indices[place]] = record
            progress.advance(plan.shards[indices[place]].images, shards=len(records))


def _killers(plan: Plan, spans: Sequence[ShardSpan], resources: Resources) -> Iterator[int]:
    """Positions of the images that kill the process that decodes them, twice when they are alone.

    What is not survived is halved, so that one image among thousands costs a dozen processes.
    """
    import ray

    shared = ray.put(plan)
    survived = partial(survives, try_images, resources, shared)
    suspects = [(span.start, span.stop) for span in reversed(spans)]
    while suspects:
        start, stop = suspects.pop()
        if survived(start, stop):
            continue
        if stop - start == 1:
            if not survived(start, stop):
                yield start
            continue
        middle = (start + stop) // 2
        suspects += [(middle, stop), (start, middle)]


def _spooled(plan: Plan, source_bytes: int, resources: Resources) -> Plan:
    """The plan, reading from a spool that is made first, where that is better than reading the source."""
    import ray

    chunks = spool_chunks(plan.reader, source_bytes, len(plan.shards))
    if not chunks:
        return plan
    shared, positions = ray.put(plan), ray.put(positions_of_items(plan.order))

    def spool(row: dict[str, Any]) -> None:
        plan, chunk = ray.get(shared), range(row["first"], row["last"])
        spool_chunk(plan.directory, plan.reader, ray.get(positions), row["number"], chunk)

    rows = [{"number": i, "first": chunk.start, "last": chunk.stop} for i, chunk in enumerate(chunks)]
    with (
        Progress("spool", sum(map(len, chunks)), "images") as progress,
        closing(on_cluster(spool, rows, resources)) as spooled,
    ):
        for place, _ in spooled:
            progress.advance(len(chunks[place]))
    return replace(plan, spooled=len(chunks))


def _rejected_in(records: dict[int, ShardWork]) -> list[Rejected]:
    return [(key, reason) for record in records.values() for key, reason in record["rejected"]]


def _about_source(source: Source, scan: Scan, digests: dict[str, str]) -> dict[str, Any]:
    return {
        "kind": source.kind.value,
        "uri": source.config.uri,
        "files": len(source.files),
        "bytes": sum(file.size for file in source.files),
        "images": len(scan.candidates) + scan.rejected_images,
        "digest": digest(sorted(digests.items())),
        "config": identity(source.config),
    }
