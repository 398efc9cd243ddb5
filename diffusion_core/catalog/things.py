"""The things of a store, and which of them each needs: the graph by which it is decided what may go.

A thing is known by its key, its path in the store, so that a store that was moved is read as well.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from diffusion_core.catalog.notes import notes
from diffusion_core.catalog.reading import parallel, read_record
from diffusion_core.store import Directory, Entry, layout
from diffusion_core.store.lease import seems_held

SILENCE_S = 3600.0  # after which a lease counts as given up: far more than clocks differ
LONGEST_SILENCE_S = 30 * 86400.0  # of a job, which writes nothing while all goes well
_FOLDERS = {  # of what a stage's turns are about
    "shard": layout.DATASETS,
    "generate": layout.IMAGES,
    "evaluate": layout.EVALUATIONS,
    "compare": layout.COMPARISONS,
}
_KEYS = re.compile(rf'(?:{layout.RUNS}|{layout.IMAGES})/[^/"\s]+|{layout.DATASETS}/[^/"\s]+/[^/"\s]+')

Records = dict[str, dict[str, Any] | None]  # by key; None: the record, which is the commit of the thing, is not there


class Kind(StrEnum):
    """What a thing is."""

    comparison = "comparison"
    evaluation = "evaluation"
    images = "image set"
    run = "run"
    dataset = "dataset version"
    copy = "copy of a bundle"
    gate = "gate"
    job = "job"
    lease = "lease"
    note = "note"


@dataclass(frozen=True)
class Thing:
    """A thing of a store: `whole` if its commit is there, `busy` if somebody works on it now.

    A thing is a folder, with the key of which those of its files begin, or else it is the one `file`.
    """

    key: str
    kind: Kind
    whole: bool = True
    busy: bool = False
    file: Entry | None = None


@dataclass(frozen=True)
class Survey:
    """The things by their keys, and the keys of what each needs.

    `needs` has keys of things that are not there too: a model may outlive its run. `evaluated` are the image sets that
    were made to be evaluated only.
    """

    things: dict[str, Thing]
    needs: Mapping[str, set[str]]
    evaluated: set[str]


def survey(store: Directory) -> Survey:
    """Look at everything in a store."""
    runs = _records(store, layout.RUNS, layout.RUN)
    images = _records(store, layout.IMAGES, layout.SET)
    evaluations = _records(store, layout.EVALUATIONS, layout.EVALUATION)
    comparisons = _records(store, layout.COMPARISONS, layout.ABOUT)
    names = [layout.dataset(name) for name in (store / layout.DATASETS).children()]
    datasets = {key: record for name in names for key, record in _records(store, name, layout.MANIFEST).items()}

    home = _homes(store, runs)
    needs: defaultdict[str, set[str]] = defaultdict(set)
    for key, record in _whole(runs):
        start = record.get("init_from")
        needs[key] |= {_dataset(record), *_homes_of(home, [start["digest"]] if start else [])}
    for key, record in _whole(images):
        guides = record.get("guides", {}).values()
        needs[key] |= {
            _dataset(record),
            layout.run(record["run_id"]),
            layout.fetched_bundle(str(record.get("bundle_digest"))),
            *(layout.run(guide["run_id"]) for guide in guides),
        }
    for key, record in _whole(evaluations):
        guides = [text.rpartition(" ")[2] for text in record.get("guided_by", [])]
        needs[key] |= {_dataset(record), _set_of(record), *_homes_of(home, guides)}
        _measures(needs, key, record)
    for key, record in _whole(comparisons):
        needs[key] |= {_dataset(record), *_homes_of(home, _guides_of_cells(store / key))}
        _measures(needs, key, record)

    work = survey_work(store)
    things = dict(work.things)
    for key, needed in work.needs.items():
        needs[key] |= needed
    busy = {key for key in runs if seems_held(store / key / layout.ATTEMPTS, SILENCE_S)}
    for kind, records in (
        (Kind.comparison, comparisons),
        (Kind.evaluation, evaluations),
        (Kind.images, images),
        (Kind.run, runs),
        (Kind.dataset, datasets),
    ):
        things |= {key: Thing(key, kind, record is not None, key in busy) for key, record in records.items()}
    for model in (store / layout.GATES).children():
        key = layout.gate(model)
        things[key] = Thing(key, Kind.gate, busy=seems_held(store / key, SILENCE_S))
    for copy in (store / layout.BUNDLES).children():
        key = layout.fetched_bundle(copy)
        things[key] = Thing(key, Kind.copy, (store / key).exists(layout.BUNDLE))
    for key, file, about in notes(store, list(things), home):
        things[key] = Thing(key, Kind.note, file=file)
        for user in about:
            needs[user].add(key)
    return Survey(things, needs, {_set_of(record) for _, record in _whole(evaluations)})


def survey_work(store: Directory) -> Survey:
    """Look at the jobs and their turns alone."""
    jobs, leases = _jobs(store), _leases(store)
    return Survey({thing.key: thing for thing in (*jobs[0], *leases[0])}, {**jobs[1], **leases[1]}, set())


def claims(store: Directory) -> set[str]:
    """The keys of all claims of turns, `leases/<stage>/<work>/<n>.json`."""
    keys = (f"{layout.LEASES}/{entry.key}" for entry in (store / layout.LEASES).list())
    return {key for key in keys if key.rpartition("/")[2].removesuffix(".json").isdigit()}


def _records(store: Directory, folder: str, record: str) -> Records:
    keys = [f"{folder}/{name}" for name in (store / folder).children()]
    return dict(zip(keys, parallel(lambda key: read_record(store / key, record), keys), strict=True))


def _whole(records: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, record) for key, record in records.items() if record is not None)


def _homes(store: Directory, runs: Iterable[str]) -> dict[str, str]:
    """The run that exported a bundle, by the bundle's digest."""

    def digests(key: str) -> list[str]:
        bundles = store / key / layout.BUNDLES
        read = (read_record(bundles / name, layout.BUNDLE) for name in bundles.children())
        return [record["digest"] for record in read if record is not None]

    keys = list(runs)
    return {digest: key for key, found in zip(keys, parallel(digests, keys), strict=True) for digest in found}


def _homes_of(home: Mapping[str, str], digests: Iterable[str]) -> Iterator[str]:
    return (home[digest] for digest in digests if digest in home)


def _dataset(record: Mapping[str, Any]) -> str:
    return layout.dataset_version(record["dataset"]["name"], record["dataset"]["version"])


def _set_of(evaluation: Mapping[str, Any]) -> str:
    return layout.image_set(Directory(evaluation["image_set"]).name)


def _measures(needs: defaultdict[str, set[str]], key: str, record: Mapping[str, Any]) -> None:
    """What was measured of a model and the model's run stay or go together."""
    run = layout.run(record["bundle"]["run_id"])
    needs[key].add(run)
    needs[run].add(key)


def _guides_of_cells(comparison: Directory) -> set[str]:
    """Digests of the guides of a comparison's contestants; the cells of one differ in their seed alone."""
    first = {entry.key.rpartition("/")[0]: entry.key for entry in comparison.list(layout.CELLS)}
    cells = parallel(lambda key: read_record(comparison, key) or {}, first.values())
    return {digest for cell in cells for digest in cell.get("guides", {}).values()}


def _jobs(store: Directory) -> tuple[list[Thing], dict[str, set[str]]]:
    """The jobs, and what those that have not ended need: what their requests name."""
    keys = [layout.job(name) for name in (store / layout.JOBS).children()]
    ended = parallel(lambda key: _has_ended(store / key), keys)
    running = [key for key, over in zip(keys, ended, strict=True) if not over]
    requests = {key: json.dumps(read_record(store / key, layout.REQUEST)) for key in running}
    things = [Thing(key, Kind.job, busy=key in requests) for key in keys]
    return things, {key: set(_KEYS.findall(text)) for key, text in requests.items()}


def _has_ended(job: Directory) -> bool:
    if any(job.exists(key) for key in (layout.RESULT, layout.ERROR)):
        return True
    if job.exists(layout.LOG) and not job.exists(layout.RUNNING):  # the log grows while the job runs
        return True
    return time.time() - max((entry.modified for entry in job.list()), default=0.0) > LONGEST_SILENCE_S


def _leases(store: Directory) -> tuple[list[Thing], dict[str, set[str]]]:
    """The turns of jobs, and what those that are held need: what they are about."""
    things, needs = [], {}
    for key in sorted({claim.rpartition("/")[0] for claim in claims(store)}):
        held = seems_held(store / key, SILENCE_S)
        things.append(Thing(key, Kind.lease, busy=held))
        _, stage, work = key.split("/", 2)
        if held and stage in _FOLDERS:
            needs[key] = {f"{_FOLDERS[stage]}/{work if stage == 'shard' else work.partition('/')[0]}"}
    return things, needs
