"""The README's section "Extend it", done to a copy of the library as it stands there: a file, and a line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 20  # the section takes fewer lines

USE_IT = """
import torch
from diffusion_core.diffusion import KeyedNoise, SamplerConfig, make_sampler, make_schedule
from tests.oracles import BIMODAL, ExactDenoiser, even_log_snr, slopes

schedule, errors = make_schedule("cosine"), []
denoiser = ExactDenoiser(schedule, BIMODAL)
x_T = KeyedNoise(0, torch.arange(40)).initial((1,), dtype=torch.float64)
for steps in (40, 80, 160, 320):
    sampler = make_sampler("dpmpp_2s", schedule, steps + 1, times=even_log_snr(schedule, steps, 0.0, 6.0))
    *_, before_last, _ = sampler.trajectory(denoiser, x_T)
    errors.append(float((before_last.x_s - denoiser.flow(x_T, sampler.times[0], sampler.times[-1])).abs().max()))
assert all(abs(slope - 2) < 0.25 for slope in slopes(errors)), slopes(errors)
assert make_sampler("dpmpp_2s", make_schedule("flow"), 5).sample(denoiser, x_T).isfinite().all()
print(SamplerConfig(kind="dpmpp_2s").kind.explanation)
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library with what the README says."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "diffusion_core", copy / "diffusion_core", ignore=shutil.ignore_patterns("__pycache__"))
    section = re.search(r"^## Extend it\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    new_file, line = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert len(new_file.splitlines()) + len(line.splitlines()) < LONGEST
    place = copy / new_file.splitlines()[0].removeprefix("# ")
    assert not place.exists()
    place.write_text(new_file)
    kinds = copy / "diffusion_core/diffusion/kinds.py"
    before, after = kinds.read_text().split("\n\n\nclass Spacing(Choice):")
    assert "class SamplerKind" in before
    kinds.write_text(f"{before}\n{line}\n\nclass Spacing(Choice):{after}")
    return copy


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{ROOT}"}
    return subprocess.run([sys.executable, *command], env=environment, cwd=copy, text=True, capture_output=True)


def test_a_new_sampler_is_one_file_and_one_line(extended: Path) -> None:
    """It is found by its name, keeps its order, and starts from pure noise like any other."""
    done = run(extended, "-c", USE_IT)
    assert (done.returncode, done.stdout) == (0, "DPM-Solver++ of second order in single steps\n"), done.stderr


def test_the_command_knows_the_new_sampler(extended: Path) -> None:
    shown = run(extended, "-m", "flows.cli", "config", "schema")
    assert shown.returncode == 0, shown.stderr
    assert "dpmpp_2s: DPM-Solver++ of second order in single steps" in shown.stdout
    chosen = ["--preset", "digits", "--set", "generation.sampler.kind=dpmpp_2s"]
    accepted = run(extended, "-m", "flows.cli", "config", "show", *chosen)
    assert "kind: dpmpp_2s" in accepted.stdout, accepted.stderr
