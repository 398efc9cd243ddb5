"""How near a plan comes: `diffusion plan`, then the same pipeline in the same empty store, and their ratio by stage.

    python -m tests.benchmarks.plan_accuracy --preset digits
    python -m tests.benchmarks.plan_accuracy --preset fashion-mnist --source <folder> --images 20000

All options go to both commands. Exit status 1 if the whole is not within a factor of 1.5.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

FACTOR = 1.5


def command(verb: str, *options: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "flows.cli", verb, *options, "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> int:
    """Print the ratio of each stage and of the whole."""
    with tempfile.TemporaryDirectory() as store:
        options = [*sys.argv[1:], "--store", store]
        plan, result = command("plan", *options), command("pipeline", *options)
    fields = {"shard": "dataset", "train": "run", "evaluate": "evaluation", "register": "version", "generate": "images"}
    taken = {stage: result[field]["account"]["seconds"] for stage, field in fields.items()}
    planned = {stage["stage"]: stage["seconds"] for stage in plan["stages"]}
    planned["all"], taken["all"] = plan["seconds"], sum(taken.values())
    for stage, seconds in planned.items():
        print(f"{stage:<10} planned {seconds:6.0f} s  took {taken[stage]:6.0f} s  ratio {seconds / taken[stage]:.2f}")
    return 0 if 1 / FACTOR <= planned["all"] / taken["all"] <= FACTOR else 1


if __name__ == "__main__":
    sys.exit(main())
