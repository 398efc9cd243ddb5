"""The program of every job: `python -m diffusion_core.stages <stage> <request URI>`."""

from __future__ import annotations

import sys

from diffusion_core.jobs.protocol import EXIT_USER_ERROR, main
from diffusion_core.stages.registry import STAGES


def run() -> int:
    """Run the stage that argv names; the exit status is that of `jobs.protocol.main`."""
    if len(sys.argv) != 3 or sys.argv[1] not in STAGES:
        print(f"usage: python -m diffusion_core.stages {{{','.join(STAGES)}}} <request URI>", file=sys.stderr)
        return EXIT_USER_ERROR
    stage = STAGES[sys.argv[1]].load()
    return main(stage.name, stage.request, stage.run, sys.argv[2])


if __name__ == "__main__":
    sys.exit(run())
