"""Images of a set made again, and compared with what is recorded of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_core.catalog import find
from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout


def reproduce(reference: str, store: str, image_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Make images of a set again, on this machine, and compare their pixels with what is recorded.

    Returns:
        Per image its id, both digests and whether they are the same.

    Raises:
        UserError: the set, an image of it, or its model is gone.
    """
    import numpy as np

    from diffusion_core.bundle import load_bundle
    from diffusion_core.generation.formats import pixel_digest
    from diffusion_core.generation.imageset import open_imageset
    from diffusion_core.generation.worker import Generator

    images = open_imageset(find.image_set(reference, store))
    located = [images.locate(image_id) for image_id in image_ids]
    wanted, uri = images.description.bundle_digest, images.description.bundle_uri
    if not Directory(uri).exists(layout.BUNDLE):
        uri = find.registered_copy(wanted, store) or uri
    bundle = load_bundle(uri, _device(located[0].record["made_on"]))
    if bundle.digest != wanted:
        raise UserError(f"The set {images.uri} was made by the bundle {wanted}, but {uri} now holds {bundle.digest}.")
    guides = dict(images.generation.guidance.models)
    for name, guide in images.description.guides.items():
        if not Directory(guides[name]).exists(layout.BUNDLE):
            guides[name] = find.registered_copy(guide["digest"], store) or guides[name]
    generator = Generator(bundle, images.guided_by(guides), next(bundle.network.parameters()).device)
    ids = np.array(image_ids, dtype=np.int64)
    made = generator.images(ids, images.labels.of(ids))
    return [
        {
            "image_id": item.image_id,
            "same": pixel_digest(image) == item.sha256,
            "sha256": pixel_digest(image),
            "recorded": item.sha256,
            "made_on": generator.made_on,
            "recorded_on": item.record["made_on"],
        }
        for item, image in zip(located, made, strict=True)
    ]


def _device(made_on: str) -> str:
    """The kind of device that the images were made on, if this machine has one."""
    import torch

    return "cuda" if torch.cuda.is_available() and "NVIDIA" in made_on else "cpu"
