"""The job that turns a source of images into a dataset version: `python -m diffusion_core.jobs.shard <request URI>`.

Pass 1 hashes the source and finds the version's name. If that version exists, nothing else happens and Ray is not even
imported. Pass 2 makes the shards with Ray Data, one row of work for each shard: a worker reads the items of its shard
in their final order, so that nothing but a shard's number travels between workers and memory does not grow with the
source. Each finished shard is committed by a record, which the next attempt finds.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, suppress
from typing import Any, cast

from diffusion_core.config import UserError, digest, identity
from diffusion_core.data.hashing import HashCache, dataset_version, hash_files
from diffusion_core.data.sharding import (
    WORK,
    Plan,
    check_rejected,
    check_reused,
    finished_shards,
    make_plan,
    make_shard,
    positions_of_items,
    spool_chunk,
    spool_chunks,
    with_spool,
)
from diffusion_core.data.shards import MANIFEST, ImageDataset, commit_dataset, open_dataset
from diffusion_core.data.sources import Scan, Source, open_source
from diffusion_core.data.sources.listing import SourceFile
from diffusion_core.jobs.cluster import ray_session
from diffusion_core.jobs.protocol import main
from diffusion_core.jobs.requests import Resources, ShardRequest, ShardResult
from diffusion_core.progress import Progress
from diffusion_core.storage import Directory

HASH_HERE_BYTES, HASH_HERE_FILES = 2 << 30, 20_000  # more than that is hashed by the cluster
_FILES_A_TASK = 500

log = logging.getLogger(__name__)


def run(request: ShardRequest) -> ShardResult:
    """Make the dataset version that the request describes, or find it.

    Raises:
        UserError: the source is absent, empty, not what it is said to be, or too much of it had to be rejected.
    """
    began = time.monotonic()
    source = open_source(request.source)
    source.limit(request.dataset.max_file_mb << 20)
    home = Directory(request.store) / f"datasets/{request.dataset.name}"
    with ExitStack() as cluster:
        digests = _hash_source(source, home, request.resources, cluster)
        version = dataset_version(source, digests, request.dataset)
        directory = home / version
        reused = directory.exists(MANIFEST)
        dataset = open_dataset(directory) if reused else _make(request, source, digests, directory, cluster)
    if reused:
        check_reused(dataset, request.dataset)
    if WORK in directory.children():
        with suppress(OSError):  # another job that was at the same version may be clearing up as well
            (directory / WORK).delete_tree()
    return ShardResult(
        seconds=time.monotonic() - began,
        reused=reused,
        uri=dataset.uri,
        version=dataset.version,
        splits=dataset.splits,
        rejected=dataset.manifest["rejected"]["rows"],
        shards=len(dataset.manifest["shards"]),
    )


def _hash_source(source: Source, home: Directory, resources: Resources, cluster: ExitStack) -> dict[str, str]:
    """SHA-256 of every file by key, from the cache where size and stamp are unchanged."""
    cache = HashCache(home, source.config.uri or source.kind.value)
    files = {file.key: file for file in source.files if source.needs_hash(file)}
    digests = {key: known for key, file in files.items() if (known := cache.get(file)) is not None}
    missing = [file for key, file in files.items() if key not in digests]
    if not missing:
        return digests
    here = len(missing) <= HASH_HERE_FILES and sum(file.size for file in missing) <= HASH_HERE_BYTES
    problems: dict[str, str] = {}
    with Progress("hash", len(missing), "files") as progress:
        for key, sha256, problem in (
            hash_files(source, missing) if here else _hash_on_cluster(source, missing, resources, cluster)
        ):
            progress.advance()
            if problem:
                problems[key] = problem
                continue
            digests[key] = sha256
            cache.put(files[key], sha256)
    source.exclude(problems)
    cache.save()
    return digests


def _hash_on_cluster(
    source: Source, files: list[SourceFile], resources: Resources, cluster: ExitStack
) -> Generator[tuple[str, str, str]]:
    kind, config, place = type(source), source.config, source.place

    def hash_some(row: dict[str, Any]) -> list[tuple[str, str, str]]:
        some = [SourceFile(key, size) for key, size in json.loads(row["files"])]
        return list(hash_files(kind(config, place, some), some))

    parts = [files[first : first + _FILES_A_TASK] for first in range(0, len(files), _FILES_A_TASK)]
    rows = [{"files": json.dumps([(file.key, file.size) for file in part])} for part in parts]
    cluster.enter_context(ray_session(resources))
    with closing(_on_cluster(hash_some, rows, resources)) as answers:
        for hashed in answers:
            yield from ((key, sha256, problem) for key, sha256, problem in hashed)


def _make(
    request: ShardRequest, source: Source, digests: dict[str, str], directory: Directory, cluster: ExitStack
) -> ImageDataset:
    """Pass 2: make the shards that are missing, judge the rejects, and commit."""
    config = request.dataset
    scan = source.scan(digests)
    total = len(scan.candidates) + scan.rejected_images
    check_rejected(directory, scan.rejected, scan.rejected_images, total, config)
    plan = make_plan(directory, scan, config)
    records = finished_shards(plan)
    if records:
        log.info("%d of %d shards are already finished.", len(records), len(plan.shards))
    try:
        if len(records) < len(plan.shards):
            cluster.enter_context(ray_session(request.resources))
            _make_shards(plan, sum(file.size for file in source.files), records, request.resources)
    except Exception:
        if directory.exists(MANIFEST):  # another job was at the same version, finished first, and cleared up
            return open_dataset(directory)
        raise
    in_shards = [tuple(rejected) for record in records.values() for rejected in record["rejected"]]
    rejected = [*scan.rejected, *in_shards]
    check_rejected(directory, rejected, scan.rejected_images + len(in_shards), total, config)
    return commit_dataset(
        directory,
        version=directory.name,
        image_shape=plan.image_shape,
        class_names=scan.class_names,
        shards=[records[index]["shard"] for index in range(len(plan.shards))],
        rejected=rejected,
        has_text=scan.has_text,
        source=_about_source(source, scan, digests),
        config=identity(config),
        software={name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pyarrow")},
    )


def _make_shards(plan: Plan, source_bytes: int, records: dict[int, dict[str, Any]], resources: Resources) -> None:
    """Make the shards that have no record yet, and add theirs."""
    import ray

    if chunks := spool_chunks(plan, source_bytes):
        _spool(plan, chunks, resources)
        plan = with_spool(plan, len(chunks))
    shared = ray.put(plan)

    def make(row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], **make_shard(ray.get(shared), row["index"])}

    missing = [{"index": index} for index in range(len(plan.shards)) if index not in records]
    done = sum(plan.shards[index].stop - plan.shards[index].start for index in records)
    with (
        Progress("shard", len(plan.order), "images", initial=done) as progress,
        closing(_on_cluster(make, missing, resources)) as made,
    ):
        for record in made:
            index = record.pop("index")
            records[index] = record
            span = plan.shards[index]
            progress.advance(span.stop - span.start, shards=len(records))


def _spool(plan: Plan, chunks: list[range], resources: Resources) -> None:
    import ray

    shared, positions = ray.put(plan), ray.put(positions_of_items(plan))

    def spool(row: dict[str, Any]) -> int:
        chunk = range(row["first"], row["last"])
        spool_chunk(ray.get(shared), ray.get(positions), row["number"], chunk)
        return len(chunk)

    rows = [{"number": i, "first": chunk.start, "last": chunk.stop} for i, chunk in enumerate(chunks)]
    with (
        Progress("spool", sum(map(len, chunks)), "images") as progress,
        closing(_on_cluster(spool, rows, resources)) as spooled,
    ):
        for images in spooled:
            progress.advance(images)


def _on_cluster(
    work: Callable[[dict[str, Any]], Any], rows: list[dict[str, Any]], resources: Resources
) -> Generator[Any]:
    """Apply `work` to every row with Ray Data and yield the results (anything that JSON can hold) as they come.

    A worker that dies is replaced `resources.max_failures` times. A `UserError` in a worker is raised here.
    """
    import ray

    def careful(row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"answer": json.dumps(work(row)), "error": ""}
        except UserError as error:
            return {"answer": "", "error": str(error)}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it would warn that there are no bars
    with warnings.catch_warnings():
        # Ray Data retries for ever unless told otherwise, and this deprecated way is the only one to tell it.
        warnings.simplefilter("ignore")
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            careful,
            num_cpus=resources.cpus_per_worker,
            compute=ray.data.TaskPoolStrategy(size=resources.workers),
            max_retries=resources.max_failures,
        )
    # Left to the garbage collector, an unfinished execution would wake Ray up again after its shutdown.
    with closing(cast("Generator[dict[str, str]]", iter(data.iter_rows()))) as answers:
        for answer in answers:
            if answer["error"]:
                raise UserError(answer["error"])
            yield json.loads(answer["answer"])


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


if __name__ == "__main__":
    sys.exit(main("shard", ShardRequest, run))
