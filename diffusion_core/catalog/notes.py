"""Small records that remember something about other things of a store: each stays while what it is about stays.

A note that is gone too early does harm: an event would be told again, a retried request would get other images, and a
watched source would be taken for new. One that is about nothing any more only takes room.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffusion_core.catalog.reading import parallel, read_record
from diffusion_core.store import Directory, Entry, layout

Record = dict[str, Any]
About = Callable[[str, Record], Iterable[str]]  # keys of things, of the name of a note and what stands in it

_RUNS = re.compile(rf'{layout.RUNS}/[^/"\s]+')
_COMPARISONS = re.compile(rf'{layout.COMPARISONS}/[^/"\s]+')


def notes(store: Directory, keys: Sequence[str], home: Mapping[str, str]) -> Iterator[tuple[str, Entry, set[str]]]:
    """Every note with its key, its file, and the keys of what it is about, whether that is there or not.

    Args:
        keys: of the things of the store.
        home: the run that exported a bundle, by the bundle's digest.
    """
    askers = _askers(store, keys)
    about: dict[str, About] = {
        layout.EVENTS: lambda name, record: _of_event(record, home),
        layout.OUTCOMES: lambda name, record: _RUNS.findall(json.dumps(record)),
        layout.ASKED: lambda name, record: askers.get(name, ()),
        layout.PLANS: lambda name, record: (),  # of a time to come: it goes by its age alone
        layout.WATCHED: lambda name, record: _versions(name, keys),
    }
    for folder, things_of in about.items():
        place = store / folder
        entries = list(place.list())
        records = parallel(lambda entry, place=place: read_record(place, entry.key), entries)  # type: ignore[misc]
        for entry, record in zip(entries, records, strict=True):
            if record is not None:
                name = entry.key.rpartition("/")[2].removesuffix(".json")
                yield f"{folder}/{entry.key}", entry, set(things_of(name, record))
    for dataset in (store / layout.DATASETS).children():
        place = store / layout.dataset(dataset)
        for entry in place.list(layout.SOURCE_HASHES):
            yield f"{layout.dataset(dataset)}/{entry.key}", entry, set(_versions(dataset, keys))


def _versions(dataset: str, keys: Sequence[str]) -> Iterator[str]:
    return (key for key in keys if key.startswith(f"{layout.dataset(dataset)}/"))


def _of_event(record: Record, home: Mapping[str, str]) -> Iterable[str]:
    """What an event is about, of its resource `diffusion.<kind>.<thing>` and of what can happen once only."""
    _, kind, thing = record["resource"].split(".", 2)
    once = str(record["once"])
    if kind == "dataset":
        return [layout.dataset_version(thing, once)]
    if kind == "run":
        return [layout.run(thing)]
    if kind == "bundle":
        return [home[thing]] if thing in home else []
    if kind == "images":
        return [layout.image_set(thing)]
    if kind == "samplers":
        return _COMPARISONS.findall(once)
    return [layout.evaluation(thing), layout.gate(thing)]  # of models, by their names, and of their figures


def _askers(store: Directory, keys: Sequence[str]) -> dict[str, list[str]]:
    """The sets that somebody got who asked for new images, by who that was."""

    def who(key: str) -> list[str | None]:
        place = store / key
        return [(read_record(place, entry.key) or {}).get("asked") for entry in place.list(layout.EXTENSIONS)]

    sets = [key for key in keys if key.startswith(f"{layout.IMAGES}/")]
    found: dict[str, list[str]] = {}
    for key, asked in zip(sets, parallel(who, sets), strict=True):
        for name in filter(None, asked):
            found.setdefault(name, []).append(key)
    return found
