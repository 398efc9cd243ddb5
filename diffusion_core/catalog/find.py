"""From what a person types to what is meant. Everywhere where something of the store can be named, these are its names:

    dataset      digits (its newest version), digits@0e1f2a (a version, or its beginning), digits/0e1f2a
    model        digits@champion, digits@latest, digits/3, with or without models:/ before it; or a bundle or run
    bundle       the id of its run, which means the newest one
    run, set     its id, or its beginning

A path or URI names each of them too. The beginning of an id has 6 characters at least, and only one id has it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion_core.bundle import BundleConfig, read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout

if TYPE_CHECKING:
    from diffusion_core.tracking import ResolvedModel

SHORTEST = 6  # characters of the beginning of an id
_SHOWN = 10
_REGISTERED = re.compile(r"(?:models:/)?([^/:@\s]+(?:@[A-Za-z0-9_-]+|/[0-9]+))")


@dataclass(frozen=True)
class FoundBundle:
    """A bundle, with its configuration."""

    uri: str
    config: BundleConfig


@dataclass(frozen=True)
class Found:
    """What something is, `image set`, `model`, `dataset version` or `bundle`, and its URI (of a model its bundle's)."""

    what: str
    uri: str


def dataset(reference: str, store: str, option: str) -> str:
    """The URI of a dataset version; what is given as a place is handed back whether it is one or not.

    Raises:
        UserError: the store has no such dataset or version; `option` begins the sentence.
    """
    if _is_place(reference) or Directory(reference).exists(layout.MANIFEST):
        return Directory(reference).uri
    datasets = Directory(store) / layout.DATASETS
    name, _, version = reference.strip("/").replace("@", "/", 1).partition("/")
    versions = [child for child in (datasets / name).children() if (datasets / name / child).exists(layout.MANIFEST)]
    if not versions:
        known = _known(name, datasets.children(), "datasets")
        raise UserError(f"{option} {reference}: the store {store} has no such dataset; {known}.")
    if not version:
        return (datasets / name / newest_version(datasets / name, versions)).uri
    try:
        return (datasets / name / _chosen(version, versions, "version")).uri
    except UserError as error:
        raise UserError(f"{option} {reference}: {error}") from None


def newest_version(dataset: Directory, versions: list[str]) -> str:
    """The version of a dataset that was complete last; of several at once always the same one."""

    def written(version: str) -> tuple[float, str]:
        manifest = next(entry for entry in (dataset / version).list(layout.MANIFEST) if entry.key == layout.MANIFEST)
        return manifest.modified, version

    return max(versions, key=written)


def model(reference: str, store: str) -> ResolvedModel:
    """The bundle of a model, and the version to call it by."""
    from diffusion_core.tracking import resolve_model

    return resolve_model(model_reference(reference, store), store)


def model_reference(reference: str, store: str) -> str:
    """`models:/name@alias` or `models:/name/version`, which nobody looked up yet, or the URI of a bundle."""
    named = registered(reference)
    return named if named and not Directory(reference).exists(layout.BUNDLE) else bundle_uri(reference, store)


def registered(reference: str) -> str | None:
    """`models:/name@alias` or `models:/name/version` for what is written like a registered model, else None."""
    if reference.startswith("models:"):
        return reference
    match = _REGISTERED.fullmatch(reference)
    return f"models:/{match[1]}" if match else None


def bundle(reference: str, store: str) -> FoundBundle:
    """A bundle by its place, by its run (the run's newest), or by a name in the registry."""
    uri = bundle_uri(reference, store)
    return FoundBundle(uri, read_bundle_config(uri))


def bundle_uri(reference: str, store: str) -> str:
    """The URI of the bundle that a reference means; a place is handed back, whether it is one or not."""
    named = registered(reference)
    if not reference.startswith("models:") and Directory(reference).exists(layout.BUNDLE):
        return Directory(reference).uri
    if named:
        from diffusion_core.tracking import resolve_model

        return resolve_model(named, store).bundle_uri
    place = Directory(reference) if _is_place(reference) else _run(reference, store, lambda: _model_names(store))
    bundles = place / layout.BUNDLES
    if exported := [name for name in bundles.children() if (bundles / name).exists(layout.BUNDLE)]:
        return (bundles / max(exported, key=_number)).uri
    if place.exists(layout.RUN):
        raise UserError(f"The run {place.name} has no bundle yet; training exports one at its end.")
    return place.uri


def run(reference: str, store: str) -> Directory:
    """The directory of a run."""
    return _run(reference, store, list)


def image_set(reference: str, store: str) -> str:
    """The URI of an image set."""
    return _by_id(reference, Directory(store) / layout.IMAGES, layout.SET, "image set", list).uri


def anything(reference: str, store: str) -> Found:
    """What a reference means where it may mean anything: an image set, a model, a dataset version, or a bundle."""
    if reference.startswith("models:"):
        return Found("model", bundle_uri(reference, store))
    with suppress(UserError):
        return Found("image set", image_set(reference, store))
    if registered(reference) and not Directory(reference).exists(layout.BUNDLE):
        with suppress(UserError):
            return Found("model", bundle_uri(reference, store))
    for what, record, look in (
        ("dataset version", layout.MANIFEST, _any_dataset),
        ("bundle", layout.BUNDLE, bundle_uri),
    ):
        with suppress(UserError):
            uri = look(reference, store)
            if Directory(uri).exists(record):
                return Found(what, uri)
    raise UserError(
        f"{reference}: there is no image set, model, bundle, run or dataset of that name in the store {store}; "
        f"{_known(reference, _all_names(store), 'names')}."
    )


def registered_copy(digest: str, store: str) -> str | None:
    """Where the registry has a bundle of this digest; None if it has none."""
    from diffusion_core.tracking import resolve_model

    for row in registered_versions(digest, store):
        with suppress(UserError):
            return resolve_model(f"models:/{row['name']}/{row['version']}", store).bundle_uri
    return None


def registered_versions(digest: str, store: str) -> list[dict[str, Any]]:
    """The registered versions of a bundle, as `tracking.list_models` tells them; none if the registry is away."""
    from diffusion_core.tracking import list_models

    try:
        return [row for row in list_models(store) if row["tags"].get("bundle_digest") == digest]
    except UserError:  # the registry is away: the chain of files stands without it
        return []


def _run(reference: str, store: str, others: Callable[[], Iterable[str]]) -> Directory:
    return _by_id(reference, Directory(store) / layout.RUNS, layout.RUN, "run", others)


def _by_id(reference: str, root: Directory, record: str, kind: str, others: Callable[[], Iterable[str]]) -> Directory:
    """A directory of `root`, or anywhere, that holds this record. `others` may be meant where there is none."""
    if _is_place(reference) or Directory(reference).exists(record):
        place = Directory(reference)
    else:
        wanted = reference.strip("/")
        place = root / wanted
        if not place.exists(record):
            place = root / _chosen(wanted, root.children(), kind, others)
    if not place.exists(record):
        raise UserError(f"There is no {kind} {reference}: {place.uri} holds no {record}.")
    return place


def _chosen(wanted: str, ids: list[str], kind: str, others: Callable[[], Iterable[str]] = list) -> str:
    """The id that is meant: `wanted` itself, or the only one that begins with it."""
    if wanted in ids:
        return wanted
    begun = [each for each in ids if each.startswith(wanted)]
    if len(begun) == 1 and len(wanted) >= SHORTEST:
        return begun[0]
    if begun:
        raise UserError(
            f"{wanted} is the beginning of {', '.join(begun[:_SHOWN])}: give at least {SHORTEST} characters of its "
            "id, and as many as tell it from others."
        )
    raise UserError(f"There is no {kind} {wanted}; {_known(wanted, [*ids, *others()], f'{kind}s')}.")


def _known(wanted: str, names: list[str], kind: str) -> str:
    """What there is, as the end of a sentence: the nearest name, or the first ones."""
    if near := difflib.get_close_matches(wanted, names, n=1):
        return f"the nearest name is {near[0]}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"the {kind} are: {', '.join(names[:_SHOWN]) or 'none'}{more}"


def _any_dataset(reference: str, store: str) -> str:
    return dataset(reference, store, "dataset")


def _all_names(store: str) -> list[str]:
    root = Directory(store)
    return [
        *_model_names(store),
        *(name for kind in (layout.DATASETS, layout.RUNS, layout.IMAGES) for name in (root / kind).children()),
    ]


def _model_names(store: str) -> list[str]:
    """The registered models, each version as a person would type it; none if the registry is away."""
    from diffusion_core.tracking import list_models

    with suppress(UserError):
        rows = list_models(store)
        aliases = [f"{row['name']}@{alias}" for row in rows for alias in row["aliases"]]
        return [*aliases, *(f"{row['name']}/{row['version']}" for row in rows)]
    return []


def _is_place(reference: str) -> bool:
    return "://" in reference or reference.startswith(("/", "./", "../", "~"))


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else -1
