"""What is in a store: datasets, runs, models and image sets, as rows of plain values.

The first value of a row names the thing wherever one is asked for. `bytes` are those of all its files, `changed` is
when it was changed last, in Unix seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion_core.catalog.find import newest_version
from diffusion_core.store import Directory, layout

Row = dict[str, Any]


def datasets(store: str) -> list[Row]:
    """Every complete dataset version; `alias` is the name alone for the newest of its name."""
    rows = []
    root = Directory(store) / layout.DATASETS
    for name in root.children():
        versions = [child for child in (root / name).children() if (root / name / child).exists(layout.MANIFEST)]
        newest = newest_version(root / name, versions) if versions else None
        for version in versions:
            place = root / f"{name}/{version}"
            manifest = place.read_json(layout.MANIFEST)
            rows.append(
                {
                    "dataset": f"{name}/{version}",
                    "alias": name if version == newest else "",
                    "images": " ".join(f"{split}={rows}" for split, rows in manifest["splits"].items()),
                    "shape": "x".join(map(str, manifest["image_shape"])),
                    **_size_and_age(place),
                    "uri": place.uri,
                }
            )
    return rows


def runs(store: str) -> list[Row]:
    """Every training run with its newest checkpoint and bundle."""
    rows = []
    root = Directory(store) / layout.RUNS
    for run_id in root.children():
        place = root / run_id
        bundles = place / layout.BUNDLES
        exported = [name for name in bundles.children() if (bundles / name).exists(layout.BUNDLE)]
        rows.append(
            {
                "run": run_id,
                "checkpoint": _newest((place / layout.CHECKPOINTS).children()),
                "bundle": _newest(exported),
                **_size_and_age(place),
                "uri": place.uri,
            }
        )
    return rows


def models(store: str) -> list[Row]:
    """Every version of every registered model."""
    from diffusion_core.tracking import list_models

    found = list_models(store)
    latest = {row["name"]: row["version"] for row in found}  # the versions of a name come in order
    return [
        {
            "model": f"models:/{row['name']}/{row['version']}",
            "aliases": " ".join([*row["aliases"], *(["latest"] if latest[row["name"]] == row["version"] else [])]),
            "run": row["tags"].get("run_id", ""),
            "dataset": f"{row['tags'].get('dataset', '')}/{row['tags'].get('dataset_version', '')}",
            "changed": row["created"],
            "bundle": row["tags"].get("bundle_uri", ""),
        }
        for row in found
    ]


def imagesets(store: str) -> list[Row]:
    """Every image set with the number of its images, and whether it was made to be evaluated only."""
    from diffusion_core.generation.imageset import open_imageset

    root = Directory(store) / layout.IMAGES
    evaluated = {Directory(report["image_set"]).name for report in evaluations(store).values()}
    rows = []
    for set_id in root.children():
        if (root / set_id).exists(layout.SET):
            images = open_imageset(root / set_id)
            rows.append(
                {
                    "set": set_id,
                    "images": images.total_images(),
                    "for": "evaluation" if set_id in evaluated else "use",
                    "run": images.description.run_id,
                    **_size_and_age(images.directory),
                    "uri": images.uri,
                }
            )
    return rows


def evaluations(store: str) -> dict[str, Row]:
    """The report of every evaluation by its URI."""
    root = Directory(store) / layout.EVALUATIONS
    places = (root / child for child in root.children())
    return {place.uri: place.read_json(layout.EVALUATION) for place in places if place.exists(layout.EVALUATION)}


KINDS: dict[str, Callable[[str], list[Row]]] = {
    "models": models,
    "datasets": datasets,
    "imagesets": imagesets,
    "runs": runs,
}


def _newest(names: list[str]) -> str:
    numbers = [name for name in names if name.isdecimal()]
    return max(numbers, key=int) if numbers else ""


def _size_and_age(place: Directory) -> dict[str, float]:
    size, changed = 0, 0.0
    for entry in place.list():
        size, changed = size + entry.size, max(changed, entry.modified)
    return {"bytes": size, "changed": changed}
