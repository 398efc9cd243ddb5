"""What of a pipeline's work is done already, and how much is left. Nothing is written, no torch is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from diffusion_core.bundle import bundle_digest, read_bundle_config
from diffusion_core.data.hashing import HashCache, dataset_version, digests_of, hash_files
from diffusion_core.data.sharding import make_plan
from diffusion_core.data.shards import ImageDataset, open_dataset
from diffusion_core.data.sources import Source, open_source
from diffusion_core.generation.imageset import describe
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.work.evaluate import find_evaluation
from diffusion_core.stages.work.guide import with_guides_found
from diffusion_core.store import Directory, layout
from diffusion_core.training.run import RunDirectory, TrainSpec, find_run


class State(StrEnum):
    """What would become of a stage."""

    done = "found done"
    continues = "will continue"
    runs = "will run"


@dataclass(frozen=True)
class Work:
    """What a stage has to do. images: that are left; seconds: that were spent before."""

    state: State
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Outlook:
    """The work of each stage, by name, and the images that it is about.

    hash_s: seconds that it took to hash what the store does not know of the source, as the job has to again; digests:
    SHA-256 of each file of it; extractor: whether the evaluation finds its feature extractor trained; bundle_uri: of
    the trained model, None before it is there; samples: images of each side of the evaluation; has_champion: whether a
    gate of this model decided before.
    """

    work: Mapping[str, Work]
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    rows: Mapping[str, int]
    hash_s: float
    digests: Mapping[str, str]
    extractor: bool = False
    bundle_uri: str | None = None
    samples: int = 0
    has_champion: bool = False


def look(config: PipelineConfig) -> Outlook:
    """Look at the store and the source, whose files are read as far as the store does not know their digests.

    Raises:
        UserError: the source cannot be read, or does not suit the configuration.
    """
    source, hash_s, digests, dataset = _dataset(config)
    if dataset is None:
        scan = source.scan(digests)
        shards = make_plan(Directory(config.store), scan, config.dataset)
        shape, classes = shards.image_shape, tuple(scan.class_names)
        rows: dict[str, int] = {}
        for span in shards.shards:
            rows[span.split] = rows.get(span.split, 0) + span.images
    else:
        shape, classes, rows = dataset.image_shape, tuple(dataset.class_names), dict(dataset.splits)
    work = {"shard": Work(State.runs, sum(rows.values())) if dataset is None else Work(State.done)}
    work["train"], bundle_uri = _training(config, dataset)
    samples = min(config.evaluation.samples, rows.get("test", 0), rows.get("train", 0))
    work |= _after(config, dataset, bundle_uri, samples)
    return Outlook(
        work,
        shape,
        classes,
        rows,
        hash_s=hash_s,
        digests=digests,
        extractor=dataset is not None and _has_extractor(config, dataset),
        bundle_uri=bundle_uri,
        samples=samples,
        has_champion=next((Directory(config.store) / layout.gate(config.name)).list(), None) is not None,
    )


def _dataset(config: PipelineConfig) -> tuple[Source, float, dict[str, str], ImageDataset | None]:
    """The source, the seconds that hashing it took, its digests, and the version if it is there."""
    source = open_source(config.source, config.store)
    source.limit(config.dataset.max_file_mb << 20)
    home = Directory(config.store) / layout.dataset(config.dataset.name)
    cache = HashCache(home, source.config.uri or source.kind.value)
    began = time.monotonic()
    digests = digests_of(source, cache, partial(hash_files, source))
    hash_s = time.monotonic() - began
    place = home / dataset_version(source, digests, config.dataset)
    return source, hash_s, digests, open_dataset(place) if place.exists(layout.MANIFEST) else None


def _training(config: PipelineConfig, dataset: ImageDataset | None) -> tuple[Work, str | None]:
    """What is left to train, and the URI of the bundle if that is nothing."""
    target = config.training.target_images
    if dataset is None:
        return Work(State.runs, target), None
    spec = TrainSpec(dataset_uri=dataset.uri, process=config.process, network=config.network, training=config.training)
    start = None
    if config.training.init_from:
        from diffusion_core.catalog import find

        start = find.bundle_uri(config.training.init_from, config.store)
    run = find_run(config.store, spec, start)
    if outcome := run.finished(config.training):
        return Work(State.done), run.bundle(outcome.images_seen).uri
    seen, seconds = _reached(run)
    return Work(State.continues if seen else State.runs, max(0, target - seen), seconds), None


def _reached(run: RunDirectory) -> tuple[int, float]:
    """Images seen and seconds spent at the newest checkpoint."""
    keys = [entry.key for entry in run.checkpoints.list() if entry.key.endswith(f"/{layout.CHECKPOINT}")]
    if not keys:
        return 0, 0.0
    newest = max(keys, key=lambda key: int(key.partition("/")[0]))
    return int(newest.partition("/")[0]), float(run.checkpoints.read_json(newest)["meta"]["seconds"])


def _after(
    config: PipelineConfig, dataset: ImageDataset | None, bundle_uri: str | None, samples: int
) -> dict[str, Work]:
    """Evaluation, registration and generation: what they find done is about a bundle that is there."""
    count = config.generation.count
    if dataset is None or bundle_uri is None:
        return {
            "evaluate": Work(State.runs, samples),
            "register": Work(State.runs),
            "generate": Work(State.runs, count),
        }
    found = find_evaluation(config.store, bundle_uri, dataset.uri, config.evaluation)
    return {
        "evaluate": Work(State.runs, samples) if found is None else Work(State.done),
        "register": Work(State.done if _registered(config, bundle_uri) else State.runs),
        "generate": _generation(config, bundle_uri),
    }


def _registered(config: PipelineConfig, bundle_uri: str) -> bool:
    """Whether a pipeline came to its end with this bundle before."""
    outcomes = Directory(config.store) / layout.outcomes(config.name)
    return any(outcomes.read_json(entry.key).get("bundle") == bundle_uri for entry in outcomes.list())


def _generation(config: PipelineConfig, bundle_uri: str) -> Work:
    generation = config.generation.model_copy(
        update={"guidance": with_guides_found(config.generation.guidance, config.store)}
    )
    images = describe(config.store, bundle_uri, bundle_digest(bundle_uri), read_bundle_config(bundle_uri), generation)
    wanted = images.look(generation.first_image_id, generation.count)
    missing = images.missing(wanted)
    left = sum(min(shard.stop, wanted.stop) - max(shard.first_image_id, wanted.first) for shard in missing)
    left += sum(stop - first for first, stop in wanted.gaps)
    if not left:
        return Work(State.done)
    return Work(State.runs if left == generation.count else State.continues, left)


def _has_extractor(config: PipelineConfig, dataset: ImageDataset) -> bool:
    from diffusion_core.evaluation.identity import classifier_identity

    place = dataset.directory / layout.extractor(classifier_identity(config.evaluation.classifier, dataset.version))
    return place.exists(layout.EXTRACTOR)
