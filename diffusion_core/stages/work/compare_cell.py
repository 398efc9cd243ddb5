"""One cell of a comparison, made by a worker: the images of one contestant and one seed, and their figures. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffusion_core.bundle import Bundle, bundle_digest, load_bundle
from diffusion_core.config import Config, UserError, identity
from diffusion_core.data.shards import open_dataset
from diffusion_core.evaluation.config import EvaluationConfig
from diffusion_core.evaluation.features import Features, Measurer, Reference
from diffusion_core.evaluation.report import brief_figures
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.labels import Labels
from diffusion_core.generation.worker import Generator, NonFiniteImages
from diffusion_core.store import Directory

TOLD_EVERY_S = 1.0
_BLOCK = 1024  # images, about, that are in memory at a time


class Shared(Config):
    """What all cells of a comparison have in common."""

    directory_uri: str
    bundle_uri: str
    bundle_digest: str
    dataset_uri: str
    evaluation: EvaluationConfig
    images: int
    device: str


class Count:
    """How many rows some networks were given: their evaluations, of which a guided call of n images takes 2n.

    Args:
        tally: told every second how many there were since it was told last.
    """

    def __init__(self, tally: Callable[[int], None] = lambda rows: None) -> None:
        self.rows = self._told = 0
        self._tally, self._next = tally, time.monotonic() + TOLD_EVERY_S

    def add(self, network: nn.Module, inputs: Any, output: Tensor) -> None:
        self.rows += len(output)
        if time.monotonic() >= self._next:
            self._tell(self.rows)

    def end(self, foreseen: int) -> None:
        """Tell the rest of what was foreseen, whatever it came to."""
        self._tell(foreseen)

    def _tell(self, rows: int) -> None:
        self._tally(rows - self._told)
        self._told, self._next = rows, time.monotonic() + TOLD_EVERY_S


@contextmanager
def counted(networks: Iterable[nn.Module], count: Count) -> Iterator[Count]:
    """Count what networks compute inside the block, whoever calls them."""
    handles = [network.register_forward_hook(count.add) for network in networks]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def padded(images: int, batch_size: int) -> int:
    """Images that are computed to make some: the last batch is as large as the others."""
    return -(-images // batch_size) * batch_size


def make_cell(shared: Shared, tally: Callable[[int], None], row: dict[str, Any]) -> None:
    """Make and store one cell, unless it is there.

    A network that gives no finite values for some image will never do otherwise, so that is stored as well, as the
    cell's error; the other contestants go on.

    Args:
        tally: told the number of network evaluations whenever some are done; in all, of as many as were foreseen.
        row: `key` of the cell; `generation` as plain values, and its `seed`; `guides`, digests of the other models that
            take part by the names of their fields; and the `evaluations` that are foreseen.

    Raises:
        UserError: the bundle or a guide is not the one that the comparison began with.
    """
    directory = Directory(shared.directory_uri)
    if directory.exists(row["key"]):
        tally(row["evaluations"])
        return
    bundle, measurer, reference = _tools(shared)
    config = GenerationConfig.model_validate({**row["generation"], "seed": row["seed"]})
    generator = Generator(bundle, config, shared.device)
    _check_guides(config.guidance.models, row["guides"])  # now that they are loaded
    cell = {"schema_version": 2, "generation": identity(config), "guides": row["guides"], "made_on": generator.made_on}
    count = Count(tally)
    try:
        cell |= _figures(shared, generator, measurer, reference, count)
    except NonFiniteImages as error:
        cell["error"] = str(error)
    count.end(row["evaluations"])
    directory.create_json(row["key"], cell)


def _check_guides(uris: dict[str, str], digests: dict[str, str]) -> None:
    for name, uri in uris.items():
        if bundle_digest(uri) != digests[name]:
            raise UserError(f"The {name} {uri} is not the one that the comparison began with.")


def _figures(
    shared: Shared, generator: Generator, measurer: Measurer, reference: Reference, count: Count
) -> dict[str, float]:
    batch_size, labels = generator.config.batch_size, Labels(generator.bundle.config.num_classes)
    size, parts = batch_size * max(1, round(_BLOCK / batch_size)), []  # whole batches, of which each is computed once
    for first in range(0, shared.images, size):
        ids = np.arange(first, min(first + size, shared.images))
        with counted(generator.networks, count):
            images = generator.images(ids, labels.of)
        parts.append(measurer.features(images, labels.of(ids)))
    found = brief_figures(reference, Features.joined(parts), shared.evaluation.neighbours)
    return {"evaluations": count.rows / padded(shared.images, batch_size), **found}


@lru_cache(maxsize=1)
def _tools(shared: Shared) -> tuple[Bundle, Measurer, Reference]:
    """What a worker's process loads once for all its cells."""
    bundle = load_bundle(shared.bundle_uri, shared.device)
    if bundle.digest != shared.bundle_digest:
        raise UserError(f"The bundle {shared.bundle_uri} is not the one that the comparison began with.")
    measurer = Measurer(shared.evaluation, open_dataset(shared.dataset_uri))
    return bundle, measurer, measurer.reference(shared.images)
