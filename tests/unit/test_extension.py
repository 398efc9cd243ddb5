"""The README's section "Extend it", done to a copy of the project as it stands there: each time a file, and a line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_core.data.shards import Batch, write_dataset

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 20  # lines of code, which each takes fewer of

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
    """A copy of the project with what the README says."""
    copy = tmp_path_factory.mktemp("extended")
    for folder in ("diffusion_core", "flows"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    section = re.search(r"^## Extend it\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    sampler, kind, stage, entry = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
    _add(copy, sampler, kind, "diffusion_core/diffusion/kinds.py", before="\n\nclass Spacing(Choice):")
    _add(copy, stage, entry, "diffusion_core/stages/registry.py", before=")\n\nSTAGES = ")
    return copy


def _add(copy: Path, new_file: str, line: str, registry: str, before: str) -> None:
    code = [each for each in (new_file + line).splitlines() if each and not each.startswith("#")]
    assert len(code) < LONGEST
    place = copy / new_file.splitlines()[0].removeprefix("# ")
    assert not place.exists()
    place.write_text(new_file)
    text = (copy / registry).read_text()
    assert text.count(before) == 1
    (copy / registry).write_text(text.replace(before, f"{line}{before}"))


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


ASK_PREFECT = """
import sys
from flows.deploy import deployments
from flows.stages import FLOWS

assert FLOWS["census"].name == "take-census"
form, full = (each for each in deployments(sys.argv[1]) if each.flow_name == "take-census")
print(form.name, *form._parameter_openapi_schema.properties)
print(full.name, *full._parameter_openapi_schema.definitions["CensusRequest"]["properties"])
"""


def test_a_new_stage_is_one_file_and_one_line(extended: Path, tmp_path: Path) -> None:
    """It is a verb, the program of a job, a flow, a form for people, and a deployment with every field."""
    verbs = run(extended, "-m", "flows.cli", "--help")
    assert "census            Count the images of a dataset version." in verbs.stdout, verbs.stderr
    assert "--dataset" in run(extended, "-m", "flows.cli", "census", "--help").stdout

    dataset = write_dataset(str(tmp_path), "tiny", {"train": Batch(np.zeros((3, 4, 4, 1), np.uint8))})
    (tmp_path / "request.json").write_text(json.dumps({"store": str(tmp_path), "dataset_uri": dataset.uri}))
    done = run(extended, "-m", "diffusion_core.stages", "census", str(tmp_path / "request.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["images"] == 3

    shown = run(extended, "-c", ASK_PREFECT, str(tmp_path))
    form = "census dataset preset store backend overrides"
    assert shown.stdout == f"{form}\ntake-census store resources dataset_uri\n", shown.stderr
