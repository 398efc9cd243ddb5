"""One cell of a comparison, made by a worker: the images of one contestant and one seed, and their figures. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from torch import nn

from diffusion_core.bundle import Bundle, load_bundle
from diffusion_core.config import Config, UserError
from diffusion_core.data.shards import open_dataset
from diffusion_core.diffusion.config import GuidanceConfig, SamplerConfig
from diffusion_core.evaluation.config import EvaluationConfig
from diffusion_core.evaluation.features import Measurer, Reference
from diffusion_core.evaluation.report import brief_figures
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.worker import Generator, NonFiniteImages
from diffusion_core.storage import Directory


class Bench(Config):
    """What all cells of a comparison have in common."""

    directory_uri: str
    bundle_uri: str
    bundle_digest: str
    dataset_uri: str
    evaluation: EvaluationConfig
    images: int
    batch_size: int
    device: str


class Count:
    """How many rows a network was given, and was asked to compute for one image."""

    def __init__(self) -> None:
        self.rows = 0

    def add(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.rows += len(output)


@contextmanager
def counted(network: nn.Module) -> Iterator[Count]:
    """Count the rows that a network computes inside the block, whoever calls it: guidance gives it two an image."""
    count = Count()
    handle = network.register_forward_hook(count.add)
    try:
        yield count
    finally:
        handle.remove()


def make_cell(bench: Bench, tally: Callable[[int], None], row: dict[str, Any]) -> None:
    """Make and store one cell, unless it is there.

    A network that gives no finite values for some image will never do otherwise, so that is stored as well, as the
    cell's error; the other contestants go on.

    Args:
        tally: told the number of network evaluations, as far as they were foreseen, whenever some are done.
        row: key of the cell, seed, sampler and guidance as plain values, and the foreseen `evaluations` an image.
    """
    directory = Directory(bench.directory_uri)
    if directory.exists(row["key"]):
        tally(row["evaluations"] * bench.images)
        return
    bundle, measurer, reference = _tools(bench)
    config = GenerationConfig(
        sampler=SamplerConfig.model_validate(row["sampler"]),
        guidance=GuidanceConfig.model_validate(row["guidance"]),
        seed=row["seed"],
        labels="balanced",
        batch_size=bench.batch_size,
    )
    cell: dict[str, Any] = {"schema_version": 1, "seed": row["seed"], "sampler": row["sampler"]}
    generator = Generator(bundle, config, bench.device)
    cell |= {"guidance": row["guidance"], "made_on": generator.made_on}
    try:
        cell |= _figures(bench, generator, measurer, reference, lambda images: tally(row["evaluations"] * images))
    except NonFiniteImages as error:
        cell["error"] = str(error)
    directory.create_json(row["key"], cell)


def _figures(
    bench: Bench, generator: Generator, measurer: Measurer, reference: Reference, done: Callable[[int], None]
) -> dict[str, float]:
    classes = generator.bundle.config.num_classes
    ids = np.arange(bench.images)
    labels = ids % classes if classes else None
    with counted(generator.bundle.network) as count:
        images = generator.images(ids, labels, done)
    computed = -(-bench.images // bench.batch_size) * bench.batch_size  # the last batch is padded
    measured = measurer.features(images, labels)
    return {"evaluations": count.rows / computed, **brief_figures(reference, measured, bench.evaluation.neighbours)}


@lru_cache(maxsize=1)
def _tools(bench: Bench) -> tuple[Bundle, Measurer, Reference]:
    """What a worker's process loads once for all its cells."""
    bundle = load_bundle(bench.bundle_uri, bench.device)
    if bundle.digest != bench.bundle_digest:
        raise UserError(f"The bundle {bench.bundle_uri} is not the one that the comparison began with.")
    measurer = Measurer(bench.evaluation, open_dataset(bench.dataset_uri))
    return bundle, measurer, measurer.reference(bench.images)
