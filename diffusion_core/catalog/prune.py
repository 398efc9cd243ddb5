"""What a store could do without, and its deletion.

Things are kept for a reason (somebody works on them, they are registered, images were made for use, they are young),
and so is whatever a kept thing needs: its data, the model that its training began with, the guides of its figures.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from diffusion_core.catalog.reading import parallel
from diffusion_core.catalog.things import SILENCE_S, Kind, Survey, Thing, claims, survey, survey_work
from diffusion_core.store import Directory, Entry, layout
from diffusion_core.store.lease import seems_held

_COMMITS = {
    layout.MANIFEST,
    layout.SET,
    layout.RUN,
    layout.BUNDLE,
    layout.CHECKPOINT,
    layout.EVALUATION,
    layout.ABOUT,
    layout.COMPARISON,
}


@dataclass(frozen=True)
class Retention:
    """What may go.

    older_than_s: seconds since the last change of a thing before which it stays.
    unused: also runs, datasets, measurements and remains that nothing needs, and not only what ended jobs left.
    """

    older_than_s: float = 7 * 86400.0
    unused: bool = False


@dataclass(frozen=True)
class Row:
    """A thing of a store, whether it goes, and why it goes or stays.

    thing: its path in the store. bytes: of all its files. changed: when it was changed last, in Unix seconds.
    """

    thing: str
    kind: Kind
    uri: str
    bytes: int
    changed: float
    goes: bool
    why: str


def plan(store: str, retention: Retention) -> list[Row]:
    """Every thing of a store that the retention is about, those that go first. Nothing is touched.

    Raises:
        UserError: the registry of models is away, without which nobody knows what is needed.
    """
    root = Directory(store)
    found = survey(root) if retention.unused else survey_work(root)
    entries = parallel(partial(_files, root), found.things.values())
    files = dict(zip(found.things, entries, strict=True))
    changed = {key: _last_change(of) for key, of in files.items()}
    kept = _kept(store, found, changed, retention)
    rows = [
        Row(
            key,
            thing.kind,
            (root / key).uri,
            sum(entry.size for entry in files[key]),
            changed[key],
            key not in kept,
            kept.get(key) or _why_it_goes(thing),
        )
        for key, thing in found.things.items()
    ]
    return sorted(rows, key=lambda row: (not row.goes, list(Kind).index(row.kind), -row.changed))


def apply(store: str, rows: Iterable[Row], retention: Retention) -> list[Row]:
    """Delete what goes, users before what they use; returns these rows, as kept where somebody needs one by now.

    Stopped at any moment, it leaves nothing that reads as whole and is not, and doing it again goes on.
    """
    root = Directory(store)
    known: set[str] | None = None
    now: dict[str, Row] = {}
    done: list[Row] = []
    going = (row for row in rows if row.goes)
    for _, group in groupby(going, lambda row: Kind.note if row.kind is Kind.note else row.thing):  # all notes at once
        if (there := _names(root)) != known:  # what is new may need what goes
            known, now = there, {fresh.thing: fresh for fresh in plan(store, retention)}
        settled = parallel(partial(_settle, root, now), group)
        gone = tuple(f"{row.thing}/" for row in settled if row.goes)
        known = {name for name in there if not f"{name}/".startswith(gone)}
        done += settled
    return done


def _settle(root: Directory, now: Mapping[str, Row], row: Row) -> Row:
    """Delete what still goes as things are now; the row, as kept if it does not."""
    fresh = now.get(row.thing)
    if fresh is None:
        return row
    if not fresh.goes or fresh.changed != row.changed or _is_held(root, row):
        why = "it has changed" if fresh.goes else fresh.why
        return replace(row, goes=False, why=f"used meanwhile: {why}")
    if row.kind is Kind.note:
        root.delete(row.thing)
    else:
        _delete(root / row.thing)
    return row


def _kept(store: str, found: Survey, changed: dict[str, float], retention: Retention) -> dict[str, str]:
    """Why each thing that is kept is: for a reason of its own, or for what needs it."""
    kept = dict(_roots(store, found, changed, retention))
    waiting = list(kept)
    for key in waiting:  # it grows meanwhile
        for needed in found.needs.get(key, ()):
            if needed not in kept:
                kept[needed] = f"needed by {key}"
                waiting.append(needed)
    return kept


def _roots(store: str, found: Survey, changed: dict[str, float], retention: Retention) -> Iterator[tuple[str, str]]:
    """Things that are kept for what they are, and why. Of several reasons of one thing the last is told."""
    for key, thing in found.things.items():
        age_s = time.time() - changed[key]
        if age_s <= retention.older_than_s:
            yield key, f"changed {_days(age_s)} ago"
        if thing.kind is Kind.images and thing.whole and key not in found.evaluated:
            yield key, "images for use"
    if retention.unused:
        yield from _registered(store)
    for key, thing in found.things.items():
        if thing.busy:
            yield key, "somebody works on it"


def _registered(store: str) -> Iterator[tuple[str, str]]:
    from diffusion_core.tracking import list_models

    for row in list_models(store):
        tags, name = row["tags"], f"{row['name']}/{row['version']}"
        called = f"{name} ({', '.join(row['aliases'])})" if row["aliases"] else name
        yield layout.gate(row["name"]), f"decided about the registered {called}"
        yield layout.run(tags.get("run_id", "")), f"registered as {called}"
        yield (
            layout.dataset_version(tags.get("dataset", ""), tags.get("dataset_version", "")),
            f"data of the registered {called}",
        )


def _why_it_goes(thing: Thing) -> str:
    if thing.kind is Kind.job:
        return "files of a job that ended"
    if thing.kind is Kind.lease:
        return "turns of jobs that ended"
    if thing.kind is Kind.copy:
        return "nothing needs it; MLflow would be asked for it again"
    if thing.kind is Kind.note:
        return "it is about nothing that is there"
    return "nothing needs it" if thing.whole else "never completed, or the rest of a deletion"


def _names(root: Directory) -> set[str]:
    """What may need other things: everything that is begun is seen here first."""
    folders = (layout.JOBS, layout.RUNS, layout.IMAGES, layout.EVALUATIONS, layout.COMPARISONS)
    return claims(root) | {f"{folder}/{name}" for folder in folders for name in (root / folder).children()}


def _is_held(root: Directory, row: Row) -> bool:
    lease = {Kind.run: f"{row.thing}/{layout.ATTEMPTS}", Kind.lease: row.thing, Kind.gate: row.thing}.get(row.kind)
    return lease is not None and seems_held(root / lease, SILENCE_S)


def _delete(place: Directory) -> None:
    """Delete the files that are there now: commits first, other records next, data last."""
    keys = [entry.key for entry in place.list()]
    for rank in range(3):
        parallel(place.delete, [key for key in keys if _rank(key) == rank])
    if next(place.list(), None) is None:  # else somebody has begun it anew
        place.delete_tree()


def _rank(key: str) -> int:
    name = key.rpartition("/")[2]
    if (
        name in _COMMITS or name.startswith(layout.SET_MANIFESTS) or key.removesuffix(".json").isdigit()
    ):  # the claim of a lease
        return 0
    return 1 if name.endswith(".json") else 2


def _files(root: Directory, thing: Thing) -> list[Entry]:
    return [thing.file] if thing.file else list((root / thing.key).list())


def _last_change(files: Iterable[Entry]) -> float:
    return max((entry.modified for entry in files), default=0.0)


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds >= 86400 else f"{seconds / 3600:.1f} hours"
