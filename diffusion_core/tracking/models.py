"""Finding registered models: `models:/name@alias`, `models:/name/version`, or the URI of a bundle."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_core.bundle import bundle_digest
from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout
from diffusion_core.tracking.connection import all_pages, client, directory, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REFERENCE = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class ResolvedModel:
    """The bundle that a model reference names.

    Attributes:
        bundle_uri: where the bundle is.
        digest: the bundle's digest.
        name: name of the registered model; None if the reference was the URI of a bundle.
        number: number of its version.
        tags: tags of the version.
    """

    bundle_uri: str
    digest: str
    name: str | None = None
    number: int | None = None
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """One word for results and records: `digits/3`, or `bundle/<digest>`."""
        return f"bundle/{self.digest}" if self.name is None else f"{self.name}/{self.number}"


def resolve_model(reference: str, store: str | Directory) -> ResolvedModel:
    """Find the bundle of `models:/name@alias`, `models:/name/version` or a bundle's URI.

    Raises:
        UserError: there is no such model, alias, version or bundle, or the bundle was moved or changed.
    """
    if not reference.startswith("models:"):
        place = Directory(reference)
        return ResolvedModel(place.uri, bundle_digest(place))
    version = find_version(reference, store)
    return ResolvedModel(
        _bundle_of(version, store), version.tags["bundle_digest"], version.name, int(version.version), version.tags
    )


def check_alias(reference: str, store: str | Directory) -> None:
    """Make sure, before anything starts, that a model reference names something; `UserError` says what there is.

    Nothing is created: no database, no server.
    """
    if reference.startswith("models:"):
        find_version(reference, store)
    else:
        bundle_digest(reference)


def find_version(reference: str, store: str | Directory) -> ModelVersion:
    """The version that `models:/name@alias` or `models:/name/version` names; `UserError` if there is none."""
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        raise UserError(
            f"{reference!r} is not a model reference: give models:/name@alias, models:/name/version or a bundle's URI."
        )
    name, alias, number = parts["name"], parts["alias"], parts["version"]
    versions = model_versions(store, name)
    if not versions:
        known = ", ".join(model_names(store)) or "none"
        raise UserError(f"There is no registered model {name!r}; registered are: {known}.")
    aliases = model_aliases(store, name)
    wanted = int(number) if number else aliases.get(alias)
    if wanted is None:
        shown = ", ".join(f"{key} (version {value})" for key, value in sorted(aliases.items())) or "none"
        raise UserError(f"The model {name!r} has no alias {alias!r}; its aliases are: {shown}.")
    for version in versions:
        if int(version.version) == wanted:
            return version
    shown = ", ".join(str(version.version) for version in versions)
    raise UserError(f"The model {name!r} has no version {wanted}; its versions are: {shown}.")


def model_names(store: str | Directory) -> list[str]:
    """Names of all registered models, sorted."""
    registry = client(store, create=False)
    if registry is None:
        return []
    return sorted(model.name for model in all_pages(registry.search_registered_models))


def model_versions(store: str | Directory, name: str) -> list[ModelVersion]:
    """All versions of a registered model with their tags, the oldest first; empty if there is no such model."""
    registry = client(store, create=False)
    if registry is None:
        return []
    quoted = name.replace("'", "''")
    found = all_pages(registry.search_model_versions, filter_string=f"name='{quoted}'")
    return sorted(found, key=lambda version: int(version.version))


def model_aliases(store: str | Directory, name: str) -> dict[str, int]:
    """Aliases of a registered model and the version that each names."""
    registry = client(store, create=False)
    return (
        {}
        if registry is None
        else {key: int(value) for key, value in registry.get_registered_model(name).aliases.items()}
    )


def list_models(store: str | Directory) -> list[dict[str, Any]]:
    """Every version of every model as plain values: name, version, aliases, created (Unix seconds), run and tags."""
    rows = []
    for name in model_names(store):
        aliases = model_aliases(store, name)
        for version in model_versions(store, name):
            number = int(version.version)
            rows.append(
                {
                    "name": name,
                    "version": number,
                    "aliases": sorted(alias for alias, target in aliases.items() if target == number),
                    "created": version.creation_timestamp / 1000,
                    "mlflow_run_id": version.run_id,
                    "tags": dict(version.tags),
                }
            )
    return rows


def _bundle_of(version: ModelVersion, store: str | Directory) -> str:
    """Where the bundle of a registered version lies: where it was exported, or the copy that the registry holds."""
    wanted = version.tags.get("bundle_digest")
    if wanted is None:
        raise UserError(f"Version {version.version} of the model {version.name!r} was not registered by this project.")
    copy = f"{client(store).get_model_version_download_uri(version.name, version.version)}/artifacts/bundle"
    if proxied := copy.startswith("mlflow-artifacts:"):  # behind the server: workers need it in the store
        copy = (directory(store) / layout.fetched_bundle(wanted)).uri
    problems = []
    for uri in (version.tags.get("bundle_uri"), copy):
        if uri is None:
            continue
        if proxied and uri == copy:
            _fetch(version, store, Directory(copy))
        try:
            found = bundle_digest(uri)
        except UserError as error:
            problems.append(str(error))
            continue
        if found == wanted:
            return Directory(uri).uri
        problems.append(f"{uri} holds the bundle {found}.")
    raise UserError(
        f"The bundle {wanted} of version {version.version} of the model {version.name!r} is gone: {' '.join(problems)}"
    )


def _fetch(version: ModelVersion, store: str | Directory, place: Directory) -> None:
    """Copy a bundle from the MLflow server to the store, its record last."""
    if place.exists(layout.BUNDLE):
        return
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        uri = f"models:/{version.name}/{version.version}/artifacts/bundle"
        local = Path(download_artifacts(uri, dst_path=folder, tracking_uri=tracking_uri(store)))
        for path in sorted(local.iterdir(), key=lambda path: path.name == layout.BUNDLE):
            place.create_file(path.name, path)
