"""What is declared, what is pinned, and what is installed agree; and the rooms need only what they are allowed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from diffusion_core.stages.registry import STAGES

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "infra" / "constraints.txt").read_text()
PINS = {
    canonicalize_name(line.split("==")[0]): Version(line.split("==")[1])
    for line in CONSTRAINTS.splitlines()
    if not line.startswith("#")
}
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for text in sum(EXTRAS.values(), PROJECT["dependencies"])]

HEAVY = ("torch", "ray", "mlflow", "prefect", "pyarrow", "boto3", "sklearn", "scipy", "matplotlib", "PIL", "pandas")


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_requirement_is_a_range_and_its_pin_lies_in_it(requirement: Requirement) -> None:
    assert requirement.specifier and not any(each.operator == "==" for each in requirement.specifier)
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_the_pins_are_whole() -> None:
    """Everything that the requirements need, and what those need in turn, is pinned."""
    waiting = [(each, "") for each in REQUIREMENTS]
    seen: set[tuple[str, str]] = set()
    missing: set[str] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        new = {(name, each) for each in ("", *requirement.extras)} - seen
        seen |= new
        try:
            below = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            missing.add(name)
            continue
        if name not in PINS:
            missing.add(name)
        waiting += [(Requirement(text), each) for _, each in new for text in below]
    # CUDA packages belong to other builds of torch; setuptools is pip's own affair.
    assert {name for name in missing if not re.match(r"nvidia|cuda|triton|setuptools", name)} == set()


def test_the_pins_say_how_they_are_refreshed_and_name_no_build() -> None:
    first, *rest = CONSTRAINTS.splitlines()
    assert first.startswith("#") and "make constraints" in first
    assert [line.split("==")[0].lower() for line in rest] == sorted(line.split("==")[0].lower() for line in rest)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in rest)


def test_the_python_range_is_stated_and_kept() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    assert (3, 11) <= sys.version_info < (3, 13)


def test_presets_and_the_licence_are_shipped() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "presets/*.yaml" in shipped["diffusion_core"]
    presets = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "diffusion_core/presets").glob("*.yaml")}
    assert {"digits", "fashion-mnist", "cifar10"} <= presets.keys()
    assert "Apache License" in (ROOT / "LICENSE").read_text() and PROJECT["license"] == "Apache-2.0"


def _modules(package: str) -> list[str]:
    folder = ROOT / package.replace(".", "/")
    paths = [folder.with_suffix(".py")] if not folder.is_dir() else sorted(folder.rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def _python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "prefect", "mlflow", "typer", "rich", "sklearn", "scipy", "matplotlib"}:
            raise ModuleNotFoundError(f"{name} is not installed on this machine")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_the_library_works_without_cluster_software() -> None:
    """Importing every module of the rooms that train, sample and measure asks for no Ray, Prefect or MLflow."""
    rooms = ("config", "store", "progress", "bundle")
    rooms += ("diffusion", "networks", "data", "training", "generation")
    modules = [name for room in rooms for name in _modules(f"diffusion_core.{room}")]
    assert len(modules) > 25
    _python(BLOCKED, *modules)


LOADED = "import sys, {module}; print(*sorted(set(sys.modules) & set(sys.argv[1:])))"

LIGHT = (
    "diffusion_core", "diffusion_core.config", "diffusion_core.store", "diffusion_core.progress",
    "diffusion_core.jobs.request", "diffusion_core.jobs.protocol", "diffusion_core.stages.registry",
    *(f"diffusion_core.stages.{name}" for name in STAGES),
    "diffusion_core.diffusion", "diffusion_core.networks", "diffusion_core.data", "diffusion_core.training",
    "diffusion_core.generation", "diffusion_core.evaluation",
)  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str) -> None:
    assert _python(LOADED.format(module=module), *HEAVY).split() == []


def test_the_import_rules_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
