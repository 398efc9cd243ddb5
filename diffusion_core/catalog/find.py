"""From what a person types to what is meant: a dataset by its name, a bundle by its run, a model by its alias."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from diffusion_core.bundle import BundleConfig, read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout


@dataclass(frozen=True)
class FoundBundle:
    """A bundle, with its configuration."""

    uri: str
    config: BundleConfig


def dataset(reference: str, store: str, option: str) -> str:
    """The URI of a dataset version: given as it is, as `name/version`, or as a name that has one version only."""
    if _is_place(reference) or Directory(reference).exists(layout.MANIFEST):
        return Directory(reference).uri
    datasets = Directory(store) / layout.DATASETS
    name, _, version = reference.strip("/").partition("/")
    there = [child for child in (datasets / name).children() if (datasets / name / child).exists(layout.MANIFEST)]
    if version in there:
        return (datasets / name / version).uri
    if not version and len(there) == 1:
        return (datasets / name / there[0]).uri
    if not there:
        names = ", ".join(datasets.children()) or "none"
        raise UserError(f"{option} {reference}: the store {store} has no such dataset; its datasets are: {names}.")
    versions = ", ".join(f"{name}/{child}" for child in there)
    raise UserError(f"{option} {reference}: name one of its versions: {versions}.")


def bundle(reference: str, store: str) -> FoundBundle:
    """A bundle by its URI, by the id or URI of its run (the run's newest), or by a model reference."""
    uri = bundle_uri(reference, store)
    return FoundBundle(uri, read_bundle_config(uri))


def bundle_uri(reference: str, store: str) -> str:
    """The URI of the bundle that `reference` means; it may turn out not to be a bundle."""
    if reference.startswith("models:"):
        from diffusion_core.tracking import resolve_model

        return resolve_model(reference, store).bundle_uri
    place = Directory(reference)
    if place.exists(layout.BUNDLE):
        return place.uri
    run = _run(reference, store)
    bundles = run / layout.BUNDLES
    if exported := [name for name in bundles.children() if (bundles / name).exists(layout.BUNDLE)]:
        return (bundles / max(exported, key=_number)).uri
    if run.exists(layout.RUN):
        raise UserError(f"The run {run.name} has no bundle yet; training exports one at its end.")
    if _is_place(reference):
        return place.uri
    raise UserError(f"There is no bundle or run {reference}; {_runs_of(store)}.")


def run(reference: str, store: str) -> Directory:
    """The directory of a run, by its URI or id."""
    place = _run(reference, store)
    if not place.exists(layout.RUN):
        raise UserError(f"There is no run {reference}; {_runs_of(store)}.")
    return place


def model_reference(reference: str, store: str) -> str:
    """A model reference as it is, anything else as the URI of its bundle."""
    return reference if reference.startswith("models:") else bundle_uri(reference, store)


def image_set(reference: str, store: str) -> str:
    """The URI of an image set, given as it is or by its id."""
    if _is_place(reference) or Directory(reference).exists(layout.SET):
        return Directory(reference).uri
    return (Directory(store) / layout.image_set(reference.strip("/"))).uri


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


def _run(reference: str, store: str) -> Directory:
    return Directory(reference) if _is_place(reference) else Directory(store) / layout.run(reference.strip("/"))


def _runs_of(store: str) -> str:
    runs = ", ".join((Directory(store) / layout.RUNS).children()[:10]) or "none"
    return f"the runs of the store {store} are: {runs}"


def _is_place(reference: str) -> bool:
    return "://" in reference or reference.startswith(("/", "./", "../", "~"))


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else -1
