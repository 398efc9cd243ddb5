"""A store of records alone, as jobs would have left it: enough for whoever asks what is there and what needs what."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from diffusion_core.store import Directory

DAY_S = 86400.0


def name_of(word: str) -> str:
    """An id as the store's are, of a word that a person can read."""
    return hashlib.sha256(word.encode()).hexdigest()[:16]


class SmallStore:
    """Things are named by words; their ids are `name_of` these."""

    def __init__(self, folder: Path) -> None:
        self.uri, self.root = str(folder), Directory(folder)

    def dataset(self, word: str, name: str = "digits") -> str:
        key = f"datasets/{name}/{name_of(word)}"
        manifest = {"name": name, "version": name_of(word), "splits": {"train": 9}, "image_shape": [8, 8, 1]}
        return self._write(key, "manifest.json", manifest, "shards/part-00000.parquet")

    def run(self, word: str, dataset: str, start: str | None = None, bundle: bool = True) -> str:
        key = f"runs/{name_of(word)}"
        begun = None if start is None else {"digest": self.digest(start), "uri": "/where/it/was/once"}
        if bundle:
            record = {"digest": self.digest(word), "files": {}}
            self._write(f"{key}/bundles/64", "bundle.json", record, "model.safetensors")
        return self._write(key, "run.json", {"dataset": self._dataset(dataset), "init_from": begun}, "metrics.jsonl")

    def images(self, word: str, run: str, dataset: str, guide: str | None = None) -> str:
        guides = {} if guide is None else {"guide": {"digest": self.digest(guide), "run_id": name_of(guide)}}
        record = {
            "run_id": name_of(run),
            "bundle_digest": self.digest(run),
            "dataset": self._dataset(dataset),
            "guides": guides,
        }
        return self._write(f"images/{name_of(word)}", "set.json", record, "shards/part-00000.parquet")

    def evaluation(self, word: str, run: str, dataset: str, images: str, guide: str | None = None) -> str:
        record = {
            **self._about(run, dataset),
            "image_set": f"/where/it/was/images/{name_of(images)}",
            **({} if guide is None else {"guided_by": [f"guide {self.digest(guide)}"]}),
        }
        return self._write(f"evaluations/{name_of(word)}", "evaluation.json", record, "features.safetensors")

    def comparison(self, word: str, run: str, dataset: str, guide: str) -> str:
        key = f"comparisons/{name_of(word)}"
        self.root.create_json(f"{key}/cells/0/seed-0.json", {"guides": {"classifier": self.digest(guide)}})
        return self._write(key, "about.json", self._about(run, dataset), "views/0/comparison.png")

    def job(self, name: str, request: dict[str, Any], ended: bool = True) -> str:
        self.root.write_json(f"jobs/{name}/request.json", request)
        self.root.write_json(f"jobs/{name}/{'result' if ended else 'running'}.json", {})
        return f"jobs/{name}"

    def age(self, days: float) -> None:
        """Everything that is there was last changed so long ago."""
        for path in Path(self.uri).rglob("*"):
            before = path.stat().st_mtime - days * DAY_S
            os.utime(path, (before, before))

    @staticmethod
    def digest(run: str) -> str:
        return name_of(f"bundle of {run}")

    def _write(self, key: str, record: str, content: dict[str, Any], data: str) -> str:
        self.root.create(f"{key}/{data}", b"data")
        self.root.create_json(f"{key}/{record}", content)
        return key

    def _dataset(self, word: str) -> dict[str, str]:
        return {"name": "digits", "version": name_of(word), "uri": "/where/it/was"}

    def _about(self, run: str, dataset: str) -> dict[str, Any]:
        bundle = {"run_id": name_of(run), "digest": self.digest(run), "uri": "/where/it/was", "images_seen": 64}
        return {"bundle": bundle, "dataset": self._dataset(dataset)}
