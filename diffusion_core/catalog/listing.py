"""What is in a store: datasets, runs, models and image sets, as rows of plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion_core.store import Directory, layout

Row = dict[str, Any]


def datasets(store: str) -> list[Row]:
    """Every complete dataset version."""
    rows = []
    root = Directory(store) / layout.DATASETS
    for name in root.children():
        for version in (root / name).children():
            place = root / f"{name}/{version}"
            if place.exists(layout.MANIFEST):
                manifest = place.read_json(layout.MANIFEST)
                splits = " ".join(f"{split}={rows}" for split, rows in manifest["splits"].items())
                shape = "x".join(map(str, manifest["image_shape"]))
                rows.append({"dataset": f"{name}/{version}", "images": splits, "shape": shape, "uri": place.uri})
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
                "uri": place.uri,
            }
        )
    return rows


def models(store: str) -> list[Row]:
    """Every version of every registered model."""
    from diffusion_core.tracking import list_models

    return [
        {
            "model": f"models:/{row['name']}/{row['version']}",
            "aliases": " ".join(row["aliases"]),
            "run": row["tags"].get("run_id", ""),
            "dataset": f"{row['tags'].get('dataset', '')}/{row['tags'].get('dataset_version', '')}",
            "bundle": row["tags"].get("bundle_uri", ""),
        }
        for row in list_models(store)
    ]


def imagesets(store: str) -> list[Row]:
    """Every image set with the number of its images, and whether it was made to be evaluated only."""
    from diffusion_core.generation.imageset import open_imageset

    root = Directory(store) / layout.IMAGES
    evaluated = {report["image_set"] for report in evaluations(store).values()}
    rows = []
    for set_id in root.children():
        if (root / set_id).exists(layout.SET):
            images = open_imageset(root / set_id)
            total, run = images.total_images(), images.description.run_id
            made_for = "evaluation" if images.uri in evaluated else "use"
            rows.append({"set": set_id, "images": total, "for": made_for, "run": run, "uri": images.uri})
    return rows


def evaluations(store: str) -> dict[str, Row]:
    """The report of every evaluation by its URI."""
    root = Directory(store) / layout.EVALUATIONS
    places = (root / child for child in root.children())
    return {place.uri: place.read_json(layout.EVALUATION) for place in places if place.exists(layout.EVALUATION)}


def comparisons(store: str) -> dict[str, Row]:
    """What every comparison of samplers is about, by its URI."""
    root = Directory(store) / layout.COMPARISONS
    places = (root / child for child in root.children())
    return {place.uri: place.read_json(layout.ABOUT) for place in places if place.exists(layout.ABOUT)}


KINDS: dict[str, Callable[[str], list[Row]]] = {
    "models": models,
    "datasets": datasets,
    "imagesets": imagesets,
    "runs": runs,
}


def _newest(names: list[str]) -> str:
    numbers = [name for name in names if name.isdecimal()]
    return max(numbers, key=int) if numbers else ""
