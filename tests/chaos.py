"""Kills each part of a running stack with SIGKILL while it trains or generates: `python -m tests.chaos [WORD …]`.

After each kill three things are asked: the run reaches a final state within two minutes, by itself or, where nobody is
left to say so, after the next `stack up`; no process of it is left; and one more trigger completes with the same bytes
as a run that nothing disturbed. The store is on S3, so that everything that is recorded goes through the MLflow server.
Cases whose name has all the words in it are run (default: all), and a table in Markdown is printed at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from diffusion_core.processes import is_gone, named
from diffusion_core.store import Directory
from tests import store_digests
from tests.local_stack import LocalStack, alive, processes_about, run, wait_for
from tests.process_tree import family, kill
from tests.swift_server import swift_server

FINAL_S = 120.0  # what is promised
PATIENCE_S = 600.0  # for what a busy machine does late
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Victim(StrEnum):
    """What is killed."""

    FLOW = "flow process"
    WORKER = "worker"
    BOTH = "worker and flow process"
    PREFECT = "Prefect server"
    MLFLOW = "MLflow server"
    RAY = "Ray head"
    STACK = "stack, by down"


class Work(StrEnum):
    """What is going on meanwhile."""

    TRAIN = "training"
    GENERATE = "generation"


SERVICES = {Victim.PREFECT: "prefect", Victim.MLFLOW: "mlflow", Victim.RAY: "ray"}
DEPLOYMENTS = {Work.TRAIN: "train-model/train-model", Work.GENERATE: "generate-images/generate-images"}
ENDS = {
    Victim.FLOW: "Crashed",
    Victim.WORKER: "Completed",  # the run's own process goes on
    Victim.BOTH: "Crashed",
    Victim.PREFECT: "Completed",
    Victim.MLFLOW: "Completed",
    Victim.RAY: "Failed",
    Victim.STACK: "Crashed",
}
"""The final state of the run that was going."""
WORKERS = ("ray::MapWorker", "ray::TrainController", "ray::RayTrainWorker")  # beside actors that Ray has of its own
COUNT, IMAGES = 192, 1200


@dataclass(frozen=True)
class Case:
    """What is killed during which work, whose job is a subprocess (`local`) or one of the Ray Jobs API (`jobs`)."""

    victim: Victim
    work: Work
    backend: str

    def __str__(self) -> str:
        return f"{self.victim} during {self.work} by {self.backend}"


@dataclass(frozen=True)
class Outcome:
    """What became of the run that was going, and of the trigger after it."""

    case: Case
    state: str
    message: str
    seconds: float
    left: list[str]
    same: bool

    @property
    def wrong(self) -> list[str]:
        """What is not as promised, a phrase each."""
        found = [f"still running: {title}" for title in self.left]
        if self.state != ENDS[self.case.victim]:
            found.append(f"{self.state} instead of {ENDS[self.case.victim]}: {self.message}")
        return found if self.same else [*found, "the next trigger made other bytes"]

    @property
    def told(self) -> str:
        left = [f"**{len(self.left)} processes left**"] if self.left else []
        other = [] if self.same else ["**other bytes**"]
        return ", ".join([f"{self.state} after {self.seconds:.0f} s", *left, *other])


ALL = [Case(victim, work, backend) for victim in Victim for work in Work for backend in ("local", "jobs")]


class Chaos:
    """A stack with a Ray head, and a store on S3 in which the same work is begun again for each case."""

    def __init__(self, stack: LocalStack, store: str) -> None:
        self._stack, self._store = stack, store
        self._undisturbed: dict[Work, Any] = {}

    def run(self, case: Case) -> Outcome:
        """One case, whose work is begun anew. Raises `AssertionError` if something does not come in time."""
        if case.work not in self._undisturbed:
            self._undisturbed[case.work] = self._complete(case, f"{self._store}-undisturbed")
        self._mend()
        for folder in ("runs", "images", "leases", "jobs"):
            (Directory(self._store) / folder).delete_tree()
        run_id = self._start(case, self._store)
        wait_for(lambda: self._midway(case.work), f"the middle of the {case.work}", PATIENCE_S)
        assert self._state(run_id)["type"] == "RUNNING", self._state(run_id)
        flow = int(self._stack.api.run(run_id)["labels"]["diffusion.pid"])
        watched = self._kill(case.victim, flow)
        began = time.monotonic()
        if case.victim in (Victim.PREFECT, Victim.MLFLOW, Victim.STACK):  # what a user does
            self._stack.up()
        state = wait_for(lambda: self._final(run_id), f"a final state after the end of the {case.victim}", PATIENCE_S)
        seconds = time.monotonic() - began
        left = self._left(watched, FINAL_S - seconds)
        self._mend()
        same = self._complete(case, self._store) == self._undisturbed[case.work]
        return Outcome(case, state["name"], state["message"] or "", seconds, left, same)

    def _mend(self) -> None:
        if not all(alive(service["pid"]) for service in self._stack.services.values()):
            self._stack.up()

    def _start(self, case: Case, store: str) -> str:
        request = training(store) if case.work is Work.TRAIN else generation(store)
        parameters = {"request": request, "backend": {"kind": case.backend, "retry_delay_s": 1}}
        return self._stack.api.start(DEPLOYMENTS[case.work], parameters)

    def _complete(self, case: Case, store: str) -> dict[Any, str]:
        """Trigger the work once, and return the digests of what it made."""
        run_id = self._start(case, store)
        ended = self._stack.api.wait_for(run_id, *FINAL, seconds=PATIENCE_S)
        assert ended["state"]["type"] == "COMPLETED", ended["state"]
        return store_digests.bundles(store) if case.work is Work.TRAIN else store_digests.images(store)

    def _midway(self, work: Work) -> bool:
        folder, ending = ("runs", "checkpoints/") if work is Work.TRAIN else ("images", "shards/")
        keys = [entry.key for entry in (Directory(self._store) / folder).list()]
        return sum(ending in key and key.endswith(".json") for key in keys) >= 2

    def _kill(self, victim: Victim, flow: int) -> list[dict[str, Any]]:
        """Kill, and return all processes that this has to be the end of."""
        services = self._stack.services
        mortal = family(flow)
        if victim is Victim.STACK:
            mortal += [pid for service in services.values() for pid in family(service["pid"])]
            watched = [named(pid) for pid in set(mortal)]
            self._stack.down()
            return watched
        if victim in SERVICES:
            service = services[SERVICES[victim]]
            mortal += family(service["pid"])
            kills = family(service["pid"]) if victim is Victim.RAY else [service["pid"]]
        else:
            kills = [services["worker"]["pid"]] if victim in (Victim.WORKER, Victim.BOTH) else []
            kills += [flow] if victim in (Victim.FLOW, Victim.BOTH) else []
            mortal += kills
        watched = [named(pid) for pid in set(mortal)]
        kill(kills)
        if victim not in (Victim.FLOW, Victim.WORKER, Victim.BOTH):
            status = run("stack", "status", "--store", self._store)
            assert status.returncode == 1, f"stack status does not tell of the dead {victim}: {status.stdout}"
        return watched

    def _final(self, run_id: str) -> dict[str, Any] | None:
        state = self._state(run_id)
        return state if state["type"] in FINAL else None

    def _state(self, run_id: str) -> dict[str, Any]:
        return dict(self._stack.api.run(run_id)["state"])

    def _left(self, watched: list[dict[str, Any]], seconds: float) -> list[str]:
        """What still runs of the processes that should have ended, of the jobs and of their Ray actors."""
        head = self._stack.services["ray"]["pid"]
        deadline = time.monotonic() + max(seconds, 5.0)
        while True:
            living = {each["pid"] for each in watched if each["started"] and not is_gone(each)}
            living |= set(processes_about(f"{self._store}/jobs/"))
            titles = {pid: _title(pid) for pid in living | set(family(head))}
            busy = {pid for pid, title in titles.items() if title.startswith(WORKERS)}
            left = [titles[pid] for pid in sorted(living | busy) if titles[pid]]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)


def _title(pid: int) -> str:
    """The command line of a process, or the title that it gave itself; empty once it is gone."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def training(store: str) -> dict[str, Any]:
    from tests.toy_training import toy_request, toy_spec

    (version,) = (Directory(store) / "datasets/toy").children()
    spec = toy_spec(f"{store}/datasets/toy/{version}", images=IMAGES, checkpoint_every_images=100, log_every_images=400)
    return toy_request(store, spec, workers=1)


def generation(store: str) -> dict[str, Any]:
    sampler = {"steps": 50}
    config = {"count": COUNT, "first_image_id": 0, "batch_size": 8, "images_per_shard": 8, "sampler": sampler}
    return {"store": store, "model": f"{store}/model", "generation": config, "resources": {"workers": 1}}


@contextmanager
def chaos() -> Iterator[Chaos]:
    """A stack on a store of its own; everything of it ends with the block."""
    from tests.tiny_bundle import tiny_bundle
    from tests.toy_training import toy_dataset

    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, swift_server(Path(folder, "s3")) as server:
        os.environ |= server.environment
        server.make_bucket("chaos")
        store = "s3://chaos/store"
        for place in (store, f"{store}-undisturbed"):
            toy_dataset(place)
            tiny_bundle(f"{place}/model")
        stack = LocalStack(store, "--ray")
        try:
            stack.up()
            yield Chaos(stack, store)
        finally:
            stack.down()
            os.environ.clear()
            os.environ |= before


def table(outcomes: list[Outcome]) -> str:
    """The report, in Markdown: what became of the run and when, and what of it is not as promised."""
    columns = [(work, backend) for work in Work for backend in ("local", "jobs")]
    rows = [["killed", *(f"{work} by {backend}" for work, backend in columns)], ["---"] * (1 + len(columns))]
    told = {outcome.case: outcome.told for outcome in outcomes}
    for victim in dict.fromkeys(outcome.case.victim for outcome in outcomes):
        rows.append([victim, *(told.get(Case(victim, *column), "not tried") for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(words: list[str]) -> int:
    """Run the cases and print the report; 1 if one of them did not end as it should, or not in time."""
    outcomes, broken = [], []
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the stack ends too
    with chaos() as stack:
        for case in [case for case in ALL if all(word in str(case) for word in words)]:
            began = time.monotonic()
            try:
                outcome = stack.run(case)
            except AssertionError as error:
                broken.append(f"{case}: {error}")
                print(broken[-1], file=sys.stderr, flush=True)
                continue
            outcomes.append(outcome)
            took = time.monotonic() - began
            print(f"{outcome} in {took:.0f} s", file=sys.stderr, flush=True)
    print(table(outcomes))
    return int(bool(broken) or any(outcome.wrong or outcome.seconds > FINAL_S for outcome in outcomes))


if __name__ == "__main__":
    from tests import conftest  # at its import the environment becomes a clean one

    status = main(sys.argv[1:])
    conftest.pytest_unconfigure()
    sys.exit(status)
