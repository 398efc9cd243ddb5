"""The comparison with diffusers runs, compares like with like, and this project is not slower. Only on request:

python -m pytest -m benchmark tests/benchmarks
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.benchmark


@pytest.mark.timeout(600)
def test_not_slower_than_diffusers(tmp_path: Path) -> None:
    from tests.benchmarks.against_diffusers import main

    device = "cuda" if torch.cuda.is_available() else "cpu"
    written = main(["--device", device, "--shapes", "1", "--precision", "float32", "--out", str(tmp_path)])
    report = json.loads(written[0].read_text())
    assert [result["task"] for result in report["results"]] == ["training step", "DDIM, 50 steps"]
    for result in report["results"]:
        assert result["ratio"]["median"] > 0.95, result
