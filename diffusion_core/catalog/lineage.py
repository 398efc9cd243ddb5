"""Origins: image → shard → set → model version → run → dataset version → source. And images made again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from diffusion_core.bundle import bundle_digest, read_bundle_config
from diffusion_core.catalog import find
from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout

if TYPE_CHECKING:
    from diffusion_core.generation.imageset import ImageSet

Step = dict[str, Any]  # `what` it is, `id`, `uri`, and what is recorded of it


def lineage(reference: str, store: str, image_id: int | None = None) -> list[Step]:
    """The chain of origins of an image set, an image of it, a model, a bundle, a run or a dataset version.

    Args:
        reference: URI or id of a set, a run or a bundle; `models:/name@alias`; URI or `name/version` of a dataset.
        image_id: of a set: start from this image.

    Raises:
        UserError: there is nothing of that name.
    """
    steps = list(_steps(reference, store, image_id))
    if not steps:
        raise UserError(
            f"{reference}: there is no image set, model, bundle, run or dataset of that name in the store {store}."
        )
    return steps


def _steps(reference: str, store: str, image_id: int | None) -> Iterator[Step]:
    images = find.image_set(reference, store)
    if Directory(images).exists(layout.SET):
        yield from _of_images(images, store, image_id)
        return
    if image_id is not None:
        raise UserError(f"--image: {reference} is not an image set, so it has no image {image_id}.")
    if reference.startswith("models:"):
        yield from _of_model(reference, store)
        return
    with suppress(UserError):
        dataset = find.dataset(reference, store, "dataset")
        if Directory(dataset).exists(layout.MANIFEST):
            yield from _of_dataset(dataset)
            return
    bundle = find.bundle_uri(reference, store)
    if Directory(bundle).exists(layout.BUNDLE):
        yield from _of_bundle(bundle)


def _of_images(uri: str, store: str, image_id: int | None) -> Iterator[Step]:
    from diffusion_core.generation.imageset import open_imageset

    images = open_imageset(uri)
    described = images.description
    if image_id is not None:
        yield from _of_image(images, image_id)
    yield {
        "what": "image set",
        "id": described.set_id,
        "uri": images.uri,
        "images": images.total_images(),
        "model_versions": _model_versions(images),
        "generation": described.generation,
        **{name: guide["digest"] for name, guide in described.guides.items()},
    }
    bundle = described.bundle_uri
    if not Directory(bundle).exists(layout.BUNDLE):  # the run was pruned, but the registry keeps a copy of its models
        bundle = find.registered_copy(described.bundle_digest, store) or bundle
    if Directory(bundle).exists(layout.BUNDLE):
        yield from _registered(described.bundle_digest, store)
        yield from _of_bundle(bundle)
        return
    yield {"what": "bundle", "id": described.bundle_digest, "uri": described.bundle_uri, "missing": True}
    yield {"what": "run", "id": described.run_id}
    yield from _of_dataset(described.dataset["uri"])


def _of_image(images: ImageSet, image_id: int) -> Iterator[Step]:
    found = images.locate(image_id)
    label = None if found.label is None else images.description.class_names[found.label]
    yield {"what": "image", "id": image_id, "sha256": found.sha256, "label": label, "seed": images.generation.seed}
    yield {
        "what": "shard",
        "id": found.shard.number,
        "uri": f"{images.uri}/{found.record['key']}",
        **{name: found.record[name] for name in ("sha256", "model_version", "made_on")},
    }


def _of_model(reference: str, store: str) -> Iterator[Step]:
    from diffusion_core.tracking import resolve_model

    model = resolve_model(reference, store)
    yield {"what": "model version", "id": model.version, "tags": model.tags}
    yield from _of_bundle(model.bundle_uri)


def _of_bundle(uri: str) -> Iterator[Step]:
    config = read_bundle_config(uri)
    yield {"what": "bundle", "id": bundle_digest(uri), "uri": uri, "images_seen": config.images_seen}
    run = {
        "what": "run",
        "id": config.run_id,
        "mlflow_run_id": config.mlflow_run_id,
        "code_version": config.code_version,
    }
    yield run
    yield from _of_dataset(config.dataset.uri, config.dataset.version)


def _of_dataset(uri: str, version: str | None = None) -> Iterator[Step]:
    place = Directory(uri)
    if not place.exists(layout.MANIFEST):
        yield {"what": "dataset version", "id": version, "uri": place.uri, "missing": True}
        return
    manifest = place.read_json(layout.MANIFEST)
    yield {
        "what": "dataset version",
        "id": manifest["version"],
        "uri": place.uri,
        **{name: manifest.get(name) for name in ("name", "splits", "image_shape")},
    }
    yield {"what": "source", "id": _source_uri(manifest), "configuration": manifest.get("configuration")}


def _source_uri(manifest: dict[str, Any]) -> str:
    source = manifest.get("source") or {}
    return str(source.get("uri") or source.get("kind") or "unknown") if isinstance(source, dict) else str(source)


def _model_versions(images: ImageSet) -> list[str]:
    found: set[str] = set()
    for entry in images.directory.list(layout.SET_MANIFESTS):
        found.update(images.directory.read_json(entry.key).get("model_versions", []))
    return sorted(found)


def _registered(digest: str, store: str) -> Iterator[Step]:
    """The registered versions of a bundle."""
    for row in find.registered_versions(digest, store):
        yield {"what": "model version", "id": f"{row['name']}/{row['version']}", "aliases": row["aliases"]}
