"""Feature extractors and distances between sets of images. Light to import: names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "EvaluationConfig": "config",
    "GateConfig": "config",
    "ClassifierConfig": "config",
    "frechet_distance": "distances",
    "kernel_distance": "distances",
    "precision_recall": "distances",
    "GaussianStatistics": "distances",
    "Features": "features",
    "make_extractor": "features",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
