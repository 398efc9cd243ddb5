"""What is in one dataset version and not in another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from diffusion_core.data.shards import ImageDataset

MAX_BYTES = 64 * 1024**2  # of both versions together; more is not worth the reading


@dataclass(frozen=True)
class Difference:
    """Images of a new version against an old one, told apart by where in the source they came from."""

    added: int
    removed: int
    changed: int


def dataset_difference(old: ImageDataset, new: ImageDataset) -> Difference | None:
    """How many images were added, removed and changed; None if the versions are too large to be compared."""
    shards = [*old.manifest["shards"], *new.manifest["shards"]]
    if sum(record["bytes"] for record in shards) > MAX_BYTES:
        return None
    before, now = _images(old), _images(new)
    changed = sum(before[key] != now[key] for key in before.keys() & now.keys())
    return Difference(added=len(now.keys() - before.keys()), removed=len(before.keys() - now.keys()), changed=changed)


def _images(dataset: ImageDataset) -> dict[str, bytes]:
    """Digest of each image's pixels by its key."""
    found = {}
    for record in dataset.manifest["shards"]:
        batch = dataset.read_shard(record)
        for key, image in zip(batch.keys or (), batch.images, strict=True):
            found[key] = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    return found
