"""Does an image set still hold what it recorded? Every digest is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from diffusion_core.generation.formats import ShardContent, data_digest, data_keys, decode, pixel_digest
from diffusion_core.generation.imageset import ImageSet
from diffusion_core.generation.plan import Shard, read_extensions
from diffusion_core.store.commit import Damaged, read_recorded
from diffusion_core.store.patience import StoreUnavailable


def verify(images: ImageSet) -> Iterator[str]:
    """One sentence, naming the image or shard, per difference between what is stored and what is recorded."""
    for extension in read_extensions(images.directory):
        manifest = None
        if images.directory.exists(extension.manifest_key):
            manifest = images.directory.read_json(extension.manifest_key)
            yield from _tables(images, manifest)
        for n, shard in enumerate(extension.shards(images.generation.images_per_shard)):
            yield from _shard(images, shard, manifest["shards"][n] if manifest else None)


def _tables(images: ImageSet, manifest: dict[str, Any]) -> Iterator[str]:
    for name in ("plan", "index"):
        try:
            read_recorded(images.directory, manifest[name]["key"], manifest[name]["sha256"])
        except Damaged as error:
            yield f"{error}."


def _shard(images: ImageSet, shard: Shard, in_manifest: dict[str, Any] | None) -> Iterator[str]:
    where = f"shard {shard.number} (images {shard.first_image_id} to {shard.stop - 1})"
    record = images.record(shard)
    if record is None:
        if in_manifest is not None:
            yield f"{where}: its commit record {shard.record_key} is missing."
        elif any(images.directory.exists(key) for key in data_keys(images.generation.format, shard)[:1]):
            yield f"{where} is not committed: run the generation again."
        else:
            yield f"{where} has not been made yet: run the generation again."
        return
    if in_manifest is not None and in_manifest["sha256"] != record["sha256"]:
        yield f"{where}: its commit record and the manifest disagree."
    files = {}
    for key in data_keys(images.generation.format, shard):
        try:
            files[key] = images.directory.read(key)
        except FileNotFoundError:
            yield f"{where}: {key} is missing."
            return
    same_bytes = data_digest(files) == record["sha256"]
    differing = []
    try:
        differing = list(_images(images, shard, record, decode(images.generation.format, files)))
    except StoreUnavailable:
        raise
    except Exception as error:  # damaged bytes make decoders fail in any way they like
        yield f"{where}: {record['key']} cannot be decoded: {type(error).__name__}: {error}"
        return
    yield from differing
    if not same_bytes and not differing:
        yield f"{where}: the bytes of {record['key']} differ from its record, though every image is as recorded."


def _images(images: ImageSet, shard: Shard, record: dict[str, Any], content: ShardContent) -> Iterator[str]:
    ids = np.arange(shard.first_image_id, shard.stop)
    if content.image_ids.tolist() != ids.tolist():
        yield f"shard {shard.number} (images {ids[0]} to {ids[-1]}): it does not hold each image once, in order."
        return
    labels = images.labels.of(ids)
    for n, image_id in enumerate(ids.tolist()):
        found = pixel_digest(content.images[n])
        where = f"image {image_id} (shard {shard.number})"
        if found != record["images"][n]:
            yield f"{where}: its pixels differ from its record: {found}, recorded {record['images'][n]}."
        elif content.sha256[n] != found:
            yield f"{where}: the digest stored beside it differs from its pixels."
        if labels is not None and (content.labels is None or content.labels[n] != labels[n]):
            yield f"{where}: its label is not class {labels[n]}."
