"""What is in a store: datasets, runs, models and image sets, as rows of plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion_core.bundle import RECORD
from diffusion_core.catalog.find import MANIFEST
from diffusion_core.store import Directory

Row = dict[str, Any]


def datasets(store: str) -> list[Row]:
    """Every complete dataset version."""
    rows = []
    root = Directory(store) / "datasets"
    for name in root.children():
        for version in (root / name).children():
            place = root / f"{name}/{version}"
            if place.exists(MANIFEST):
                manifest = place.read_json(MANIFEST)
                splits = " ".join(f"{split}={rows}" for split, rows in manifest["splits"].items())
                shape = "x".join(map(str, manifest["image_shape"]))
                rows.append({"dataset": f"{name}/{version}", "images": splits, "shape": shape, "uri": place.uri})
    return rows


def runs(store: str) -> list[Row]:
    """Every training run with its newest checkpoint and bundle."""
    rows = []
    root = Directory(store) / "runs"
    for run_id in root.children():
        place = root / run_id
        exported = [name for name in (place / "bundles").children() if (place / f"bundles/{name}").exists(RECORD)]
        rows.append(
            {
                "run": run_id,
                "checkpoint": _newest((place / "checkpoints").children()),
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

    root = Directory(store) / "images"
    evaluated = {report["image_set"] for report in evaluations(store).values()}
    rows = []
    for set_id in root.children():
        if (root / set_id).exists("set.json"):
            images = open_imageset(root / set_id)
            total, run = images.total_images(), images.description.run_id
            made_for = "evaluation" if images.uri in evaluated else "use"
            rows.append({"set": set_id, "images": total, "for": made_for, "run": run, "uri": images.uri})
    return rows


def evaluations(store: str) -> dict[str, Row]:
    """The report of every evaluation by its URI."""
    root = Directory(store) / "evaluations"
    places = (root / child for child in root.children())
    return {place.uri: place.read_json("evaluation.json") for place in places if place.exists("evaluation.json")}


def comparisons(store: str) -> dict[str, Row]:
    """What every comparison of samplers is about, by its URI."""
    root = Directory(store) / "comparisons"
    places = (root / child for child in root.children())
    return {place.uri: place.read_json("about.json") for place in places if place.exists("about.json")}


KINDS: dict[str, Callable[[str], list[Row]]] = {
    "models": models,
    "datasets": datasets,
    "imagesets": imagesets,
    "runs": runs,
}


def _newest(names: list[str]) -> str:
    numbers = [name for name in names if name.isdecimal()]
    return max(numbers, key=int) if numbers else ""
