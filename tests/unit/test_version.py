"""The code's version tells apart any two states of the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

import diffusion_core
from diffusion_core.version import code_version


def _version_of(folder: Path) -> str:
    code = "from diffusion_core.version import code_version; print(code_version())"
    environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_copy_has_the_same_version_and_a_changed_line_another(tmp_path: Path) -> None:
    package = Path(diffusion_core.__file__).parent
    copy = tmp_path / "diffusion_core"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert _version_of(tmp_path) == code_version()
    assert code_version().startswith(f"{diffusion_core.__version__}+sources.")
    with open(copy / "diffusion" / "noise.py", "a") as file:
        file.write("# changed\n")
    assert _version_of(tmp_path) != code_version()
