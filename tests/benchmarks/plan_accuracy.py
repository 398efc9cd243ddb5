"""How near a plan comes: `diffusion plan`, then the same pipeline in the same empty store, and their ratio by stage.

    python -m tests.benchmarks.plan_accuracy --preset digits
    python -m tests.benchmarks.plan_accuracy --preset fashion-mnist --source <folder> --images 20000

All options go to both commands. What is printed is a table in Markdown; the ratio is planned by taken. Exit status 1 if
that of the whole is not within a factor of 1.5.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from diffusion_core.stages.pipeline import STEPS

FACTOR = 1.5


def command(verb: str, *options: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "flows.cli", verb, *options, "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> int:
    """Print what was planned and taken by each stage and by the whole."""
    with tempfile.TemporaryDirectory() as store:
        options = [*sys.argv[1:], "--store", store]
        plan, result = command("plan", *options), command("pipeline", *options)
    taken = {step.stage: result[step.field]["account"]["seconds"] for step in STEPS}
    planned = {stage["stage"]: stage["seconds"] for stage in plan["stages"]}
    planned["all"], taken["all"] = plan["seconds"], sum(taken.values())
    print("| stage | planned | took | ratio |\n|---|---|---|---|")
    for stage, seconds in planned.items():
        print(f"| {stage} | {seconds:,.0f} s | {taken[stage]:,.0f} s | {seconds / taken[stage]:.2f} |")
    return 0 if 1 / FACTOR <= planned["all"] / taken["all"] <= FACTOR else 1


if __name__ == "__main__":
    sys.exit(main())
