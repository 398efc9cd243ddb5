"""Where the figures and pictures of a run go."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Protocol

from diffusion_core.storage import Directory


class Recorder(Protocol):
    """What the loop tells about itself. `tracking.RunRecorder` is one that talks to MLflow."""

    mlflow_run_id: str

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Record figures; steps at or below the last recorded one are passed over."""

    def image(self, name: str, png: bytes) -> None:
        """Keep a picture."""

    def finish(self, status: str = "FINISHED") -> None:
        """The run ended: FINISHED, FAILED or KILLED."""


class FileRecorder:
    """Keeps the figures as `metrics.jsonl` and the pictures as `previews/<name>.png` in the run's directory."""

    mlflow_run_id = ""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        try:
            self._lines = directory.read("metrics.jsonl").decode().splitlines()
        except FileNotFoundError:
            self._lines = []
        self._last_step = json.loads(self._lines[-1])["images_seen"] if self._lines else -1

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        if images_seen <= self._last_step:
            return
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._lines.append(json.dumps({"images_seen": images_seen, "time": round(time.time(), 3), **finite}))
        self._last_step = images_seen
        self._directory.write("metrics.jsonl", ("\n".join(self._lines) + "\n").encode())

    def image(self, name: str, png: bytes) -> None:
        self._directory.write(f"previews/{name}.png", png)

    def finish(self, status: str = "FINISHED") -> None:
        """Nothing to do: every line is already there."""
