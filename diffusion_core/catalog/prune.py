"""What a store could do without: the files of old jobs and, if asked for, what nothing refers to any more."""

from __future__ import annotations

import re
import time
from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass

from diffusion_core.bundle import read_bundle_config
from diffusion_core.catalog import listing
from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout

_JOB_TIME = re.compile(r"-(\d{8}-\d{6})-[0-9a-f]+$")


@dataclass(frozen=True)
class Candidate:
    """A directory that could go."""

    uri: str
    why: str
    bytes: int


def candidates(store: str, older_than_s: float, unused: bool) -> list[Candidate]:
    """What could go. Nothing that a registered model, an image set or a bundle names is ever among it.

    Args:
        older_than_s: age from which the files of a job (request, result, log) may go.
        unused: also runs that no registered model and no image set came from, with what was measured of such runs, and
            dataset versions without a run.
    """
    found = list(_old_jobs(store, older_than_s))
    if unused:
        runs = list(_unused_runs(store))
        found += runs
        found += _their_measurements(store, {Directory(candidate.uri).name for candidate in runs})
        found += _unused_datasets(store, kept_out={candidate.uri for candidate in runs})
    return found


def remove(candidate: Candidate) -> None:
    Directory(candidate.uri).delete_tree()


def _old_jobs(store: str, older_than_s: float) -> Iterator[Candidate]:
    jobs = Directory(store) / layout.JOBS
    for name in jobs.children():
        match = _JOB_TIME.search(name)
        age = time.time() - timegm(time.strptime(match[1], "%Y%m%d-%H%M%S")) if match else 0
        if match and age > older_than_s and _has_ended(jobs / name):
            yield _candidate(jobs / name, f"files of a job that ended, {age / 86400:.0f} days old")


def _has_ended(job: Directory) -> bool:
    if any(job.exists(key) for key in (layout.RESULT, layout.ERROR)):
        return True
    return job.exists(layout.LOG) and not job.exists(layout.RUNNING)  # the log grows while the job runs


def _unused_runs(store: str) -> Iterator[Candidate]:
    used = {row["run"] for row in listing.models(store)}
    for row in listing.imagesets(store):
        if row["for"] == "use":
            guides = Directory(row["uri"]).read_json(layout.SET).get("guides", {})
            used |= {row["run"], *(guide["run_id"] for guide in guides.values())}
    root = Directory(store) / layout.RUNS
    for row in listing.runs(store):
        if row["run"] not in used and row["bundle"]:  # without a bundle it is still in training, or waits to continue
            yield _candidate(
                root / row["run"], "finished run: no registered model and no image set for use came from it"
            )


def _their_measurements(store: str, runs: set[str]) -> Iterator[Candidate]:
    sets = {row["uri"] for row in listing.imagesets(store) if row["for"] == "evaluation" and row["run"] in runs}
    for uri in sorted(sets):
        yield _candidate(Directory(uri), "samples of an evaluation of such a run")
    for uri, report in listing.evaluations(store).items():
        if report["image_set"] in sets:
            yield _candidate(Directory(uri), "report of an evaluation of such a run")
    for uri, about in listing.comparisons(store).items():
        if about["bundle"]["run_id"] in runs:
            yield _candidate(Directory(uri), "comparison of samplers of such a run")


def _unused_datasets(store: str, kept_out: set[str]) -> Iterator[Candidate]:
    used: set[str] = set()
    for row in listing.runs(store):
        if row["uri"] in kept_out:
            continue
        if not row["bundle"]:
            return  # a run without a bundle does not tell which dataset it reads: nothing is certain to be unused
        used.add(_dataset_of(Directory(row["uri"]) / layout.bundle(row["bundle"])))
    for images in listing.imagesets(store):
        if images["for"] == "use":
            used.add(str(Directory(images["uri"]).read_json(layout.SET)["dataset"]["uri"]))
    for row in listing.datasets(store):
        if row["uri"] not in used and Directory(row["uri"]).exists(layout.MANIFEST):
            yield _candidate(Directory(row["uri"]), "dataset version: no run and no image set came from it")


def _dataset_of(bundle: Directory) -> str:
    if not bundle.exists(layout.BUNDLE):
        raise UserError(f"{bundle.uri} is not a bundle, so prune cannot tell which dataset it came from.")
    return Directory(read_bundle_config(bundle).dataset.uri).uri


def _candidate(place: Directory, why: str) -> Candidate:
    return Candidate(place.uri, why, sum(entry.size for entry in place.list()))
