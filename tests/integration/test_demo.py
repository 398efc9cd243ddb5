"""The demo as a newcomer runs it: a temporary Prefect server, a Ray of its own, all images; and once more at once."""

from __future__ import annotations

import json
import subprocess

import pytest

from diffusion_core.generation import open_imageset
from tests.digits_quality import legible, recall

STAGES = ("dataset", "run", "evaluation", "version", "images")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_works_and_the_second_finds_everything_done(store: str, python: str) -> None:
    first, second = (_demo(store, python) for _ in range(2))
    assert [first[stage]["reused"] for stage in STAGES] == [False] * 5
    assert first["version"]["promoted"]
    images, labels = open_imageset(first["images"]["uri"]).read(0, 1000)
    assert images.shape == (1000, 8, 8, 1)
    assert legible(images, labels) >= 0.95
    assert recall(images) >= 0.6
    assert [second[stage]["reused"] for stage in STAGES] == [True] * 5
    assert second["images"]["uri"] == first["images"]["uri"]


def _demo(store: str, python: str) -> dict[str, dict[str, object]]:
    command = [python, "-m", "flows.cli", "demo", "--store", store, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, object]] = json.loads(done.stdout)
    return result
