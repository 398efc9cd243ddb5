"""An image set: an append-only directory in which every image can say how it was made.

    set.json                      what the set is made with; its digest is the set's id
    extensions/00000.json         the log of planned ranges of image ids (see plan.py)
    plan-<first id>.parquet       one row per shard of an extension: its image ids, labels and output key
    shards/part-00000.parquet     the images (or .tar, or a folder of PNG files)
    shards/part-00000.json        commit record of the shard: digests of the data and of every image, model version
    index-<last id>.parquet       one row per image of an extension: its shard, label, seed and digest
    manifest-<last id>.json       written last: every image of the extension is stored
    contact-sheet.png, failed.parquet, log/      conveniences; nothing depends on them

Everything but the conveniences is created if absent and never changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from diffusion_core.bundle import BundleConfig, bundle_digest, check_guide, check_makes_images, read_bundle_config
from diffusion_core.config import Config, UserError, digest, identity
from diffusion_core.diffusion.config import check_guidance_scale, check_sampler
from diffusion_core.generation import tables
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.formats import ShardContent, data_keys, decode, encode, write_parquet
from diffusion_core.generation.labels import Labels, resolve_labels
from diffusion_core.generation.plan import SCHEMA_VERSION, Extension, Range, Shard, extend, look, read_extensions
from diffusion_core.generation.sheet import choose_images, contact_sheet
from diffusion_core.store import Directory, layout

PARALLEL_REQUESTS = 16
_LABEL_FIELDS = ("labels", "label_column")

T = TypeVar("T")
R = TypeVar("R")


class SetDescription(Config):
    """What a set is made with: the content of `set.json`."""

    schema_version: int = SCHEMA_VERSION
    set_id: str
    bundle_uri: str
    bundle_digest: str
    run_id: str
    dataset: dict[str, str]
    generation: dict[str, Any]
    labels: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    guides: dict[str, dict[str, str]] = Field(default_factory=dict)  # digest, run_id of the others that take part


@dataclass(frozen=True)
class Located:
    """Where one image is and what is recorded of it."""

    image_id: int
    label: int | None
    shard: Shard
    sha256: str
    record: dict[str, Any]


class ImageSet:
    """A set in the store, complete or not."""

    def __init__(self, directory: Directory, description: SetDescription, labels: Labels | None = None) -> None:
        self.directory, self.description = directory, description
        self._labels = labels

    @property
    def uri(self) -> str:
        return self.directory.uri

    @cached_property
    def generation(self) -> GenerationConfig:
        """The identity of the generation; its `labels` field is not set, see `labels`."""
        return GenerationConfig.model_validate(self.description.generation)

    def guided_by(self, uris: dict[str, str] | None = None) -> GenerationConfig:
        """`generation`, with guide and classifier where they are now; `UserError` if they are others than planned."""
        guidance = self.generation.guidance
        found = {name: (uris or {}).get(name) or getattr(guidance, name) for name in self.description.guides}
        for name, planned in self.description.guides.items():
            if bundle_digest(found[name]) != planned["digest"]:
                raise UserError(
                    f"The {name} {found[name]} is not that which the image set {self.uri} was planned with."
                )
        return self.generation.model_copy(update={"guidance": guidance.model_copy(update=found)})

    @cached_property
    def labels(self) -> Labels:
        """The class of each image id."""
        if self._labels is not None:
            return self._labels
        count = len(self.description.class_names)
        if not self.description.labels.startswith("listed-"):
            return Labels(count)
        values = pq.read_table(pa.BufferReader(self.directory.read(layout.LABELS)))["label"].to_numpy()
        return Labels(count, values)

    # Growing.

    def look(self, first_image_id: int | None, count: int) -> Range:
        """What a request is about (see `plan.look`); nothing is written."""
        return look(self.directory, first_image_id, count, self._unfinished)

    def extend(self, first_image_id: int | None, count: int) -> Range:
        """Plan a request; returns what it is about."""
        if not self.directory.exists(layout.SET):
            if self.labels.values is not None:
                table = pa.table({"label": pa.array(self.labels.values, pa.int32())})
                self.directory.create(layout.LABELS, write_parquet(table))
            self.directory.create_json(layout.SET, self.description.model_dump(mode="json"))
        return extend(self.directory, self.generation.images_per_shard, first_image_id, count, self._unfinished)

    def missing(self, wanted: Range) -> list[Shard]:
        """The shards with images of a range that are planned and seem not to be committed yet: worth an attempt."""
        open_ones = [item for item in wanted.extensions if not self.directory.exists(item.manifest_key)]
        if not open_ones:
            return []
        committed = self._committed_keys()
        every = (shard for item in open_ones for shard in item.shards(self.generation.images_per_shard))
        inside = (shard for shard in every if shard.first_image_id < wanted.stop and wanted.first < shard.stop)
        return [shard for shard in inside if shard.record_key not in committed]

    def write_plan(self, extension: Extension) -> None:
        """The plan table of an extension, if it is not there yet."""
        if self.directory.exists(extension.plan_key):
            return
        shards = extension.shards(self.generation.images_per_shard)
        self.directory.create(extension.plan_key, tables.plan(shards, self.labels))

    def record(self, shard: Shard) -> dict[str, Any] | None:
        """The commit record of a shard; None if the shard is not committed."""
        try:
            return dict(self.directory.read_json(shard.record_key))
        except FileNotFoundError:
            return None

    def commit(self, shard: Shard, images: np.ndarray, model_version: str, made_on: str) -> dict[str, Any]:
        """Store a shard and return its commit record.

        Data and record are both created if absent. Whoever finds data there records what is stored.

        Args:
            images: (count, H, W, C) uint8, in the order of the image ids.
            made_on: device model and library version that the bytes depend on.
        """
        ids = np.arange(shard.first_image_id, shard.stop, dtype=np.int64)
        names, seed = self.description.class_names, self.generation.seed
        content = ShardContent(ids, images, self.labels.of(ids), seed, names)
        form = self.generation.format
        files = encode(form, shard, content)
        if not all(_parallel(lambda item: self.directory.create(*item), files.items())):
            stored = self._read_files(shard)
            if stored != files:
                files, content, made_on = stored, decode(form, stored), "unknown"
        record = {
            **tables.commit_record(shard, data_keys(form, shard)[-1], files, content),
            "model_version": model_version,
            "bundle_digest": self.description.bundle_digest,
            "configuration_digest": self.description.set_id,
            "made_on": made_on,
        }
        if not self.directory.create_json(shard.record_key, record):
            return dict(self.directory.read_json(shard.record_key))
        return record

    def finish(self, extension: Extension) -> bool:
        """Write index, contact sheet and manifest of an extension; False if some of its shards are not committed."""
        if self.directory.exists(extension.manifest_key):
            return True
        shards = extension.shards(self.generation.images_per_shard)
        records = _parallel(self.record, shards)
        if any(record is None for record in records):
            return False
        known = [record for record in records if record is not None]
        self.write_plan(extension)
        index = tables.index(shards, known, self.labels, self.generation.seed)
        self.directory.create(extension.index_key, index)
        self.draw_sheet(extension)
        digests = {key: self._digest(key) for key in (extension.plan_key, extension.index_key)}
        summary = tables.manifest(extension, known, self.labels, self.description.class_names, digests)
        self.directory.create_json(extension.manifest_key, {**self.description.model_dump(mode="json"), **summary})
        return True

    def draw_sheet(self, also: Extension | None = None) -> None:
        """Draw the contact sheet of all images that are stored (those of `also` are) anew."""
        ranges = _union(self._stored_ranges() + ([(also.first_image_id, also.stop)] if also else []))
        rows = choose_images(ranges, self.labels)
        wanted = sorted({image_id for ids in rows.values() for image_id in ids})
        images = dict(zip(wanted, self._read_ids(wanted), strict=True))
        named = {
            self.description.class_names[label] if label is not None else "": [images[image_id] for image_id in ids]
            for label, ids in rows.items()
        }
        self.directory.write(layout.SHEET, contact_sheet(named))

    # Reading.

    def total_images(self) -> int:
        """Images that are stored."""
        return sum(stop - first for first, stop in self._stored_ranges())

    def ranges(self) -> list[tuple[int, int]]:
        """All planned ranges [first, stop) of image ids, sorted."""
        return sorted((item.first_image_id, item.stop) for item in read_extensions(self.directory))

    def read(self, first_image_id: int = 0, count: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Images of consecutive ids, (N, H, W, C) uint8, and their classes (N,) int64 (None if there are no classes).

        `count` None: all up to the highest planned id. Raises `UserError` if one of the images is not stored.
        """
        if count is None:
            count = max((stop for _, stop in self.ranges()), default=0) - first_image_id
        ids = np.arange(first_image_id, first_image_id + max(count, 0), dtype=np.int64)
        images = self._read_ids(ids.tolist())
        shape = self.description.image_shape
        return np.stack(images) if images else np.zeros((0, *shape), np.uint8), self.labels.of(ids)

    def locate(self, image_id: int) -> Located:
        """The shard and the commit record of one image; `UserError` if it is not stored."""
        shard = self._shards_by_id([image_id])[0]
        record = self.record(shard)
        if record is None:
            raise self._absent(image_id)
        label = self.labels.of(np.array([image_id]))
        sha256 = record["images"][image_id - shard.first_image_id]
        return Located(image_id, None if label is None else int(label[0]), shard, sha256, record)

    def content(self, shard: Shard) -> ShardContent:
        """What is stored of a shard. `FileNotFoundError` if a file of it is missing."""
        return decode(self.generation.format, self._read_files(shard))

    # Inner workings.

    def _unfinished(self, log: Sequence[Extension]) -> list[Extension]:
        ends = (layout.SET_MANIFESTS, layout.SET_CLOSED)
        settled = {entry.key for end in ends for entry in self.directory.list(end)}
        return [item for item in log if not {item.manifest_key, item.closed_key} & settled]

    def _committed_keys(self) -> set[str]:
        return {entry.key for entry in self.directory.list(layout.IMAGE_SHARDS) if entry.key.endswith(".json")}

    def _stored_ranges(self) -> list[tuple[int, int]]:
        """Ranges [first, stop) of image ids: of the complete extensions, and of the committed shards of the others."""
        log = read_extensions(self.directory)
        complete = [self.directory.exists(item.manifest_key) for item in log]
        ranges = [(item.first_image_id, item.stop) for item, whole in zip(log, complete, strict=True) if whole]
        if not all(complete):
            committed = self._committed_keys()
            is_open = [item for item, whole in zip(log, complete, strict=True) if not whole]
            shards = (shard for item in is_open for shard in item.shards(self.generation.images_per_shard))
            ranges += [(shard.first_image_id, shard.stop) for shard in shards if shard.record_key in committed]
        return ranges

    def _digest(self, key: str) -> str:
        return hashlib.sha256(self.directory.read(key)).hexdigest()

    def _read_files(self, shard: Shard) -> dict[str, bytes]:
        keys = data_keys(self.generation.format, shard)
        return dict(zip(keys, _parallel(self.directory.read, keys), strict=True))

    def _read_ids(self, image_ids: Sequence[int]) -> list[np.ndarray]:
        shards = self._shards_by_id(image_ids)
        contents: dict[int, np.ndarray] = {}

        def load(shard: Shard) -> np.ndarray:
            if self.record(shard) is None:
                raise self._absent(shard.first_image_id)
            return self.content(shard).images

        images = []
        for image_id, shard in zip(image_ids, shards, strict=True):
            if shard.number not in contents:
                contents = {shard.number: load(shard)}  # ids come in order: one shard at a time is enough
            images.append(contents[shard.number][image_id - shard.first_image_id])
        return images

    def _shards_by_id(self, image_ids: Sequence[int]) -> list[Shard]:
        log = read_extensions(self.directory)
        shards: list[Shard] = []
        for image_id in image_ids:
            if shards and shards[-1].first_image_id <= image_id < shards[-1].stop:
                shards.append(shards[-1])
                continue
            item = next((item for item in log if item.first_image_id <= image_id < item.stop), None)
            if item is None:
                raise self._absent(image_id)
            shards.append(item.shard_of(image_id, self.generation.images_per_shard))
        return shards

    def _absent(self, image_id: int) -> UserError:
        return UserError(f"Image {image_id} is not in the image set {self.uri}.")


def describe(store: str, bundle_uri: str, bundle_id: str, bundle: BundleConfig, config: GenerationConfig) -> ImageSet:
    """The image set that a configuration means, `<store>/images/<set id>`; nothing is written.

    Raises:
        UserError: the configuration does not suit the model (see also `labels.resolve_labels`).
    """
    check_makes_images(bundle_uri, bundle)
    guides = _guides(bundle, config)
    _check_suits(bundle, config)
    labels = resolve_labels(config, bundle.class_names)
    kept = {name: item for name, item in identity(config).items() if name not in _LABEL_FIELDS}
    guided = [f"{name} {guide['digest']}" for name, guide in guides.items()]
    set_id = digest("image set", SCHEMA_VERSION, bundle_id, kept, labels.identity(), *guided)
    description = SetDescription(
        set_id=set_id,
        bundle_uri=bundle_uri,
        bundle_digest=bundle_id,
        run_id=bundle.run_id,
        dataset=bundle.dataset.model_dump(),
        generation=config.model_dump(mode="json", include=set(kept) - {"algorithm_version"}),
        labels=labels.identity(),
        class_names=bundle.class_names,
        image_shape=bundle.image_shape,
        guides=guides,
    )
    return ImageSet(Directory(store) / layout.image_set(set_id), description, labels)


def open_imageset(uri: str | Directory) -> ImageSet:
    """An image set that is there. Raises `UserError` if there is none, or it was written by newer code."""
    place = uri if isinstance(uri, Directory) else Directory(uri)
    try:
        fields = place.read_json(layout.SET)
        if fields["schema_version"] > SCHEMA_VERSION:
            raise UserError(f"The image set {place.uri} was written by newer code: this reads up to {SCHEMA_VERSION}.")
        return ImageSet(place, SetDescription.model_validate(fields))
    except FileNotFoundError:
        raise UserError(f"{place.uri} is not an image set: there is no {layout.SET} in it.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place.uri} is not an image set: its {layout.SET} cannot be read.") from error


def _guides(bundle: BundleConfig, config: GenerationConfig) -> dict[str, dict[str, str]]:
    """The other models that change the images."""
    found = {}
    for name, uri in config.guidance.models.items():
        guide = read_bundle_config(uri)
        check_guide(name, "generation.guidance", guide, bundle.process, bundle.image_shape, bundle.class_names)
        found[name] = {"digest": bundle_digest(uri), "run_id": guide.run_id}
    return found


def _check_suits(bundle: BundleConfig, config: GenerationConfig) -> None:
    check_sampler("generation.sampler", config.sampler, bundle.process)
    check_guidance_scale("generation.guidance", config.guidance, bundle.class_names)
    height, width, channels = bundle.image_shape
    largest = 2**31 // (height * width * channels)
    if config.images_per_shard > largest:
        raise UserError(
            f"generation.images_per_shard: {config.images_per_shard} images of {height}x{width}x{channels} do not fit "
            f"into the memory of a worker; at most {largest} are accepted."
        )


def _parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`function` of every item, in order, several at once (the time goes to the store's answers)."""
    every = list(items)
    if len(every) < 2:
        return [function(item) for item in every]
    with ThreadPoolExecutor(min(PARALLEL_REQUESTS, len(every))) as pool:
        return list(pool.map(function, every))


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges [first, stop) that hold each id once, sorted."""
    union: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if union and first <= union[-1][1]:
            union[-1] = (union[-1][0], max(stop, union[-1][1]))
        else:
            union.append((first, stop))
    return union
