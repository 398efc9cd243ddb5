"""Does a set, a dataset version or a bundle still hold what it recorded? Every digest is computed again."""

from __future__ import annotations

from contextlib import suppress

from diffusion_core.bundle import verify_bundle
from diffusion_core.catalog import find
from diffusion_core.config import UserError
from diffusion_core.data.shards import open_dataset
from diffusion_core.generation import verify as generated
from diffusion_core.generation.imageset import open_imageset
from diffusion_core.store import Directory, layout


def verify(reference: str, store: str) -> tuple[str, list[str]]:
    """Read a set, a dataset version or a bundle again and compare it with what is recorded.

    Returns:
        What was verified, and one sentence for each difference.
    """
    images = find.image_set(reference, store)
    if Directory(images).exists(layout.SET):
        return f"image set {images}", list(generated.verify(open_imageset(images)))
    bundle = _bundle_or_none(reference, store)
    if bundle is not None:
        try:
            return f"bundle {bundle}, digest {verify_bundle(bundle)}", []
        except UserError as error:
            return f"bundle {bundle}", [str(error)]
    dataset = open_dataset(find.dataset(reference, store, "verify"))
    return f"dataset version {dataset.uri}", [f"{key} {problem}." for key, problem in dataset.verify() if problem]


def _bundle_or_none(reference: str, store: str) -> str | None:
    if reference.startswith("models:"):
        return find.bundle_uri(reference, store)
    with suppress(UserError):
        uri = find.bundle_uri(reference, store)
        return uri if Directory(uri).exists(layout.BUNDLE) else None
    return None
