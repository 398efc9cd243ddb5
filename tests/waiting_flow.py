"""A flow that runs until a file says that it may end: the long run of a schedule, in tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prefect import flow


@flow(name="wait-for-file", persist_result=False)
def wait_for_file(request: dict[str, Any]) -> None:
    while not Path(request["store"], "go").exists():
        time.sleep(0.5)
