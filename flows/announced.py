"""Which process runs a flow run: it says so itself, as labels of the run, when the run begins.

The labels live on the Prefect server, beside the state that they are compared with, and so outlive every process.
"""

from __future__ import annotations

import socket
from typing import Any

from flows import processes
from flows.processes import Process

HOST, PID, STARTED = "diffusion.host", "diffusion.pid", "diffusion.started"
WORKER = "prefect.worker.name"  # a label that Prefect's workers give to the runs that they take


def announce(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook of every flow, called when it begins to run: say which process runs it."""
    from prefect.client.orchestration import get_client

    here = processes.this()
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run.id, {HOST: socket.gethostname(), PID: here.pid, STARTED: here.started})


def process_of(flow_run: Any) -> Process | None:
    """The process that a run announced, None if it announced none."""
    labels = flow_run.labels
    return Process(int(labels[PID]), str(labels[STARTED])) if PID in labels else None


def is_of_this_machine(flow_run: Any) -> bool:
    """Whether the run announced a process of this machine, or none at all."""
    return bool(flow_run.labels.get(HOST, socket.gethostname()) == socket.gethostname())
