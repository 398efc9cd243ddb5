"""The report of an evaluation: the figures of the generated images beside those of held-out real ones."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_core.evaluation.config import EvaluationConfig
from diffusion_core.evaluation.distances import (
    GaussianStatistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusion_core.evaluation.features import Features, Reference
from diffusion_core.evaluation.identity import distance_name, kernel_name

SCHEMA_VERSION = 1
_SHOWN = 8  # images a side in the picture
_TILE, _GAP, _BAR = 32, 2, 260


def figures(reference: Reference, measured: Features, config: EvaluationConfig) -> dict[str, float]:
    """All figures of a set of N images, against the train split.

    The Fréchet distance is against all training images, the kernel distance, precision and recall against N of them.
    Accuracy is the share of images that the dataset's classifier recognises as the class asked for.
    """
    distance = frechet_distance(reference.statistics, GaussianStatistics.of(measured.values))
    kernel, error = kernel_distance(
        reference.train, measured.values, config.kid_subsets, config.kid_subset_size, config.seed
    )
    precision, recall = precision_recall(reference.train, measured.values, config.neighbours)
    found = {
        distance_name(config): distance,
        kernel_name(config): kernel,
        f"{kernel_name(config)}_error": error,
        "precision": precision,
        "recall": recall,
    }
    accuracy = measured.accuracy
    return found if accuracy is None else {**found, "accuracy": accuracy}


def brief_figures(reference: Reference, measured: Features, neighbours: int) -> dict[str, float]:
    """The figures that a comparison of samplers repeats for seed after seed: those of `figures` without the kernel
    distance. Precision and recall are against as many training images as were measured."""
    precision, recall = precision_recall(reference.train[: len(measured.values)], measured.values, neighbours)
    distance = frechet_distance(reference.statistics, GaussianStatistics.of(measured.values))
    found = {"distance": distance, "precision": precision, "recall": recall}
    return found if measured.accuracy is None else {**found, "accuracy": measured.accuracy}


def accuracy_by_class(measured: Features, class_names: Sequence[str]) -> dict[str, float]:
    """Accuracy of each class that was asked for; empty without classes."""
    if measured.seen is None or measured.asked is None:
        return {}
    hits = measured.seen == measured.asked
    asked = {number: measured.asked == number for number in range(len(class_names))}
    return {class_names[number]: float(hits[rows].mean()) for number, rows in asked.items() if rows.any()}


def sentence(report: Mapping[str, Any]) -> str:
    """The report in one line."""
    parts = []
    for name, value in report["figures"].items():
        if not name.endswith("_error"):
            floor = report["floor"].get(name)
            beside = "" if floor is None else f" (real images {floor:.4g})"
            parts.append(f"{name.replace('_', ' ')} {value:.4g}{beside}")
    return f"{report['samples']} images: {', '.join(parts)}"


def picture(report: Mapping[str, Any], real: np.ndarray, generated: np.ndarray) -> bytes:
    """A small PNG: held-out real images and generated ones side by side, and each figure as a bar beside its floor.

    Args:
        real, generated: images (N, H, W, C) uint8, the same classes in the same places; the first 64 are shown.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    left, right = _grid(real), _grid(generated)
    height = max(left.height + 20, 16 + 34 * len(report["figures"]))
    sheet = Image.new("RGB", (left.width + right.width + _BAR + 40, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((0, 2), "held-out real images", fill="black", font=font)
    pen.text((left.width + 10, 2), "generated images", fill="black", font=font)
    sheet.paste(left, (0, 18))
    sheet.paste(right, (left.width + 10, 18))
    x, y = left.width + right.width + 30, 2
    for name, value in report["figures"].items():
        if name.endswith("_error"):
            continue
        floor = report["floor"].get(name)
        largest = max(1.0 if name in ("precision", "recall", "accuracy") else 1e-9, value, floor or 0.0)
        text = f"{name.replace('_', ' ')}: {value:.4g}" + ("" if floor is None else f", real images {floor:.4g}")
        pen.text((x, y), text, fill="black", font=font)
        for row, (amount, colour) in enumerate([(value, "#3465a4"), (floor or 0.0, "#aaaaaa")]):
            top = y + 15 + 6 * row
            pen.rectangle((x, top, x + 1 + max(0, round((_BAR - 10) * amount / largest)), top + 4), fill=colour)
        y += 34
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _grid(images: np.ndarray) -> Any:
    """The first images in a square, each about 32 pixels large."""
    from PIL import Image

    shown = images[: _SHOWN**2]
    height, width = shown.shape[1:3]
    scale = _TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grid = Image.new("RGB", (_SHOWN * (size[0] + _GAP), _SHOWN * (size[1] + _GAP)), "white")
    for place, image in enumerate(shown):
        tile = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))
        resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        corner = (place % _SHOWN * (size[0] + _GAP), place // _SHOWN * (size[1] + _GAP))
        grid.paste(tile.resize(size, resample).convert("RGB"), corner)
    return grid
