"""Does a set, a dataset version or a bundle still hold what it recorded? Every digest is computed again."""

from __future__ import annotations

from diffusion_core.bundle import verify_bundle
from diffusion_core.catalog import find
from diffusion_core.config import UserError
from diffusion_core.data.shards import open_dataset
from diffusion_core.generation import verify as generated
from diffusion_core.generation.imageset import open_imageset


def verify(reference: str, store: str) -> tuple[str, list[str]]:
    """Read a set, a dataset version or a bundle again and compare it with what is recorded.

    Returns:
        What was verified, and one sentence for each difference.
    """
    found = find.anything(reference, store)
    if found.what == "image set":
        return f"image set {found.uri}", list(generated.verify(open_imageset(found.uri)))
    if found.what == "dataset version":
        dataset = open_dataset(found.uri)
        return f"dataset version {dataset.uri}", [f"{key} {problem}." for key, problem in dataset.verify() if problem]
    try:
        return f"bundle {found.uri}, digest {verify_bundle(found.uri)}", []
    except UserError as error:
        return f"bundle {found.uri}", [str(error)]
