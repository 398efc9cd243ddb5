"""One process of a training run: the loop, the moving average, the checkpoints and the run's directory. No Ray here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "TrainingConfig": "config",
    "TrainSpec": "run",
    "RunDirectory": "run",
    "TrainOutcome": "run",
    "World": "world",
    "open_run": "run",
    "train": "loop",
}
__all__ = ["RunDirectory", "TrainOutcome", "TrainSpec", "TrainingConfig", "World", "open_run", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
