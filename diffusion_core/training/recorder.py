"""Where the figures and pictures of a run go."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Protocol

from diffusion_core.store import Directory, layout


class Recorder(Protocol):
    """What the loop tells about itself. `tracking.RunRecorder` is one that talks to MLflow."""

    mlflow_run_id: str

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Record figures; steps at or below the last recorded one are passed over."""

    def image(self, name: str, png: bytes) -> None:
        """Keep a picture."""

    def unrecorded(self) -> list[tuple[int, dict[str, float]]]:
        """Steps and figures that are told but not kept yet: they go with a checkpoint and are told again after it."""

    def checkpointing(self) -> None:
        """A checkpoint is about to be written: what is only taken so far is kept now."""

    def finish(self, status: str = "FINISHED") -> None:
        """The run ended: FINISHED, FAILED or KILLED."""


class FileRecorder:
    """Keeps the figures as `metrics.jsonl` and the pictures as `previews/<name>.png` in the run's directory."""

    mlflow_run_id = ""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._lines = _lines(directory)
        self._last_step = json.loads(self._lines[-1])["images_seen"] if self._lines else -1

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        if self.note(images_seen, metrics):
            self.write()

    def note(self, images_seen: int, metrics: Mapping[str, float]) -> bool:
        """Take figures without writing them yet; False for a step that was passed already."""
        if images_seen <= self._last_step:
            return False
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._lines.append(json.dumps({"images_seen": images_seen, "time": round(time.time(), 3), **finite}))
        self._last_step = images_seen
        return True

    def write(self) -> None:
        """Keep all that was taken."""
        self._directory.write(layout.METRICS, ("\n".join(self._lines) + "\n").encode())

    def image(self, name: str, png: bytes) -> None:
        self._directory.write(f"{layout.PREVIEWS}{name}.png", png)

    def unrecorded(self) -> list[tuple[int, dict[str, float]]]:
        return []

    def checkpointing(self) -> None:
        """Nothing to do: every line is already there."""

    def finish(self, status: str = "FINISHED") -> None:
        """Nothing to do: every line is already there."""


def kept_figures(directory: Directory) -> list[tuple[int, dict[str, float]]]:
    """Images seen and figures of every step that a `FileRecorder` kept in a run's directory."""
    steps = [json.loads(line) for line in _lines(directory)]
    aside = ("images_seen", "time")
    return [(step["images_seen"], {name: step[name] for name in step if name not in aside}) for step in steps]


def kept_pictures(directory: Directory) -> dict[str, bytes]:
    """The pictures that a `FileRecorder` kept, by name."""
    keys = [entry.key for entry in directory.list(layout.PREVIEWS)]
    return {key.removeprefix(layout.PREVIEWS): directory.read(key) for key in keys}


def _lines(directory: Directory) -> list[str]:
    try:
        return directory.read(layout.METRICS).decode().splitlines()
    except FileNotFoundError:
        return []
