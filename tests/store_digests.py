"""What a store holds, as digests: two stores with the same are equal to the last bit."""

from __future__ import annotations

import hashlib

import pyarrow.parquet as pq

from diffusion_core.store import Directory, layout


def images(store: str) -> dict[tuple[str, int], str]:
    """The digest of each image of all sets, by set and image id."""
    found = {}
    sets = Directory(store) / "images"
    for set_id in sets.children():
        for entry in (sets / set_id).list("shards/"):
            if entry.key.endswith(".parquet"):
                with (sets / set_id).open(entry.key) as file:
                    rows = pq.read_table(file, columns=["image_id", "sha256"]).to_pylist()
                found |= {(set_id, row["image_id"]): row["sha256"] for row in rows}
    return found


def bundles(store: str) -> dict[str, str]:
    """The digest of weights, sample sheet and identity of all bundles, by key. The rest says where a bundle lies."""
    runs = Directory(store) / "runs"
    found = {}
    for entry in runs.list():
        if entry.key.endswith((f"/{layout.WEIGHTS}", f"/{layout.SAMPLES}")):
            found[entry.key] = hashlib.sha256(runs.read(entry.key)).hexdigest()
        elif entry.key.endswith(f"/{layout.BUNDLE}"):
            found[entry.key] = str(runs.read_json(entry.key)["digest"])
    return found
