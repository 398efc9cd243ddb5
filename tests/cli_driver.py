"""Runs the `diffusion` command many times in one process, for tests that ask what it imports and how long it takes.

Reads one JSON object a line, {"arguments", "environment", "folder"}, and answers with one a line. Nothing but the
command itself is imported here, so whatever heavy is loaded was loaded by the command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import traceback
from typing import Any


def answer(question: dict[str, Any]) -> dict[str, Any]:
    os.environ.update(question["environment"])
    os.chdir(question["folder"])
    out, err = io.StringIO(), io.StringIO()
    started, started_cpu = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            from flows.cli import main

            status = main(question["arguments"])
        except BaseException:
            traceback.print_exc()
            status = -1
    for name in question["environment"]:
        del os.environ[name]
    loaded = [name for name in ("ray", "prefect") if name in sys.modules]
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - started_cpu
    took = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "loaded": loaded, **took}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
