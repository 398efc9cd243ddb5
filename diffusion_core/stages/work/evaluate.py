"""How a bundle is measured against a dataset version. Finished evaluations are found without Ray or torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion_core.bundle import BundleConfig, bundle_digest, read_bundle_config
from diffusion_core.config import UserError, digest, identity
from diffusion_core.data.shards import ImageDataset, open_dataset
from diffusion_core.evaluation.config import EvaluationConfig, EvaluationLabels, check_held_out_figures
from diffusion_core.evaluation.identity import extractor_identity
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.jobs.request import Resources
from diffusion_core.stages.work.guide import guide_digests, with_guides_found
from diffusion_core.store import Directory, layout
from diffusion_core.store.commit import RecordKind
from diffusion_core.store.turns import one_at_a_time

if TYPE_CHECKING:
    import numpy as np

    from diffusion_core.evaluation.features import Features, Reference
    from diffusion_core.generation.imageset import ImageSet

REPORT, PICTURE, FEATURES = layout.EVALUATION, layout.EVALUATION_PICTURE, layout.FEATURES
_RECORD = RecordKind(REPORT, "an evaluation", 1)
_ALGORITHM = 1  # raised when the figures are computed differently
_LEAST = 4  # images that the kernel distance needs
_BLOCK = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its directory, its report, and whether it was found done."""

    directory: Directory
    report: dict[str, Any]
    reused: bool

    @property
    def uri(self) -> str:
        return f"{self.directory.uri}/{REPORT}"

    def features(self) -> Features:
        """Features of the generated images, in the order of their ids. Needs no torch."""
        from diffusion_core.evaluation.features import Features

        return Features.from_bytes(self.directory.read(FEATURES))


def evaluate(
    store: str, bundle_uri: str, dataset_uri: str, config: EvaluationConfig, resources: Resources
) -> Evaluation:
    """Measure a bundle, or find that it was measured: `<store>/evaluations/<id>/evaluation.json`.

    The id is a digest of the bundle's digest, the dataset version, the extractor and the evaluation's identity fields.
    Uses the Ray that is initialised, else starts one for as long as images are made.

    Raises:
        UserError: no bundle or dataset there, images of different shapes, too few held-out images, or samples failed.
    """
    dataset, bundle = open_dataset(dataset_uri), read_bundle_config(bundle_uri)
    config = config.model_copy(update={"guidance": with_guides_found(config.guidance, store)})
    directory, about = _identified(store, bundle_uri, bundle, dataset, config)
    if directory.exists(REPORT):
        return Evaluation(directory, _RECORD.read(directory), reused=True)
    with one_at_a_time(store, "evaluate", directory.name):
        reused = directory.exists(REPORT)  # another job may have made it meanwhile
        if not reused:
            from diffusion_core.stages.work.generate import generate

            generation = generation_of(config, bundle, dataset)
            images = generate(bundle_uri, generation, store, resources, stage="samples to evaluate").images
            report = _measure(directory, images, dataset, config, samples_of(config, dataset), bundle_uri)
            _RECORD.commit(directory, {}, {**about, "image_set": images.uri, **report})
    return Evaluation(directory, _RECORD.read(directory), reused)


def find_evaluation(store: str, bundle_uri: str, dataset_uri: str, config: EvaluationConfig) -> Evaluation | None:
    """The evaluation that `evaluate` would find done; None if it would make it. Raises `UserError` as it does."""
    dataset, bundle = open_dataset(dataset_uri), read_bundle_config(bundle_uri)
    config = config.model_copy(update={"guidance": with_guides_found(config.guidance, store)})
    directory, _ = _identified(store, bundle_uri, bundle, dataset, config)
    return Evaluation(directory, _RECORD.read(directory), reused=True) if directory.exists(REPORT) else None


def _identified(
    store: str, bundle_uri: str, bundle: BundleConfig, dataset: ImageDataset, config: EvaluationConfig
) -> tuple[Directory, dict[str, Any]]:
    """The directory of an evaluation, and what its record says of what is measured."""
    samples_of(config, dataset)
    check_comparable(bundle, dataset)
    check_held_out_figures("evaluation", config, bundle.process)
    bundle_id, extractor = bundle_digest(bundle_uri), extractor_identity(config, dataset.version)
    guided = [f"{name} {found}" for name, found in guide_digests(config.guidance).items()]
    evaluation_id = digest("evaluation", _ALGORITHM, bundle_id, dataset.version, extractor, config, *guided)
    about = {
        "evaluation_id": evaluation_id,
        "bundle": {"uri": bundle_uri, "digest": bundle_id, "run_id": bundle.run_id, "images_seen": bundle.images_seen},
        "dataset": {"name": dataset.name, "version": dataset.version, "uri": dataset.uri},
        "configuration": json.loads(json.dumps(identity(config))),
        **({"guided_by": guided} if guided else {}),
    }
    return Directory(store) / layout.evaluation(evaluation_id), about


def attach(store: str, done: Evaluation, mlflow_run_id: str) -> None:
    """Show the figures and the floor on an MLflow run, once."""
    marker = layout.attached(mlflow_run_id)
    if done.directory.exists(marker):
        return
    from diffusion_core.tracking import record_figures

    named = {f"evaluation/{name}": value for name, value in done.report["figures"].items()}
    named |= {f"evaluation/floor/{name}": value for name, value in done.report["floor"].items()}
    record_figures(store, mlflow_run_id, named, done.report["bundle"]["images_seen"])
    done.directory.create_json(marker, {"evaluation_id": done.report["evaluation_id"]})


def samples_of(config: EvaluationConfig, dataset: ImageDataset) -> int:
    """N, the number of images on each side of the comparison. `UserError` if the dataset is too small for any."""
    least = max(_LEAST, config.neighbours + 1)
    samples = min(config.samples, dataset.num_rows("test"), dataset.num_rows("train"))
    if samples < least:
        raise UserError(
            f"The dataset {dataset.uri} has {dataset.num_rows('test')} test and {dataset.num_rows('train')} training "
            f"images; with evaluation.neighbours = {config.neighbours} at least {least} of each are needed: "
            "shard it again with a larger dataset.test_fraction."
        )
    return samples


def check_comparable(bundle: BundleConfig, dataset: ImageDataset) -> None:
    """A model is measured against images of its own shape, and of its own classes if it has any."""
    if tuple(bundle.image_shape) != dataset.image_shape:
        raise UserError(
            f"The model makes images of {_size(bundle.image_shape)} and the dataset {dataset.uri} has images of "
            f"{_size(dataset.image_shape)}: they cannot be compared."
        )
    if bundle.class_names and dataset.class_names and list(bundle.class_names) != list(dataset.class_names):
        raise UserError(
            f"The model's classes ({', '.join(bundle.class_names[:5])}, …) are not those of the dataset {dataset.uri} "
            f"({', '.join(dataset.class_names[:5])}, …): they cannot be compared."
        )


def generation_of(config: EvaluationConfig, bundle: BundleConfig, dataset: ImageDataset) -> GenerationConfig:
    """How the images to measure are made: an image set of their own, ids 0 to N − 1."""
    samples = samples_of(config, dataset)
    labels: str | tuple[int, ...] = "balanced"
    if bundle.class_names and dataset.class_names and config.labels is EvaluationLabels.dataset:
        held_out = dataset.read("test", limit=samples).labels
        labels = tuple(held_out.tolist()) if held_out is not None else labels
    return GenerationConfig(
        sampler=config.sampler,
        guidance=config.guidance,
        seed=config.seed,
        labels=labels,
        batch_size=config.batch_size,
        images_per_shard=config.batch_size * max(1, 256 // config.batch_size),
        first_image_id=0,
        count=samples,
    )


def _measure(
    directory: Directory,
    images: ImageSet,
    dataset: ImageDataset,
    config: EvaluationConfig,
    samples: int,
    bundle_uri: str,
) -> dict[str, Any]:
    """Features and figures of both sides. Keeps the features, for later comparisons, and a picture."""
    from diffusion_core.evaluation.features import Features, Measurer
    from diffusion_core.evaluation.report import accuracy_by_class, figures, picture, sentence

    measurer = Measurer(config, dataset)
    reference: Reference = measurer.reference(samples)
    if not directory.exists(FEATURES):
        made = measurer.measure(_blocks(images, samples), samples, "generated images")
        directory.create(FEATURES, made.to_bytes())
    # Of two evaluations at once, both report what the first one stored.
    generated = Features.from_bytes(directory.read(FEATURES))
    report: dict[str, Any] = {
        "samples": samples,
        "samples_note": f"N = min(evaluation.samples = {config.samples}, held-out images); the floor has the same N.",
        "reference": f"train split, {reference.statistics.count} images",
        "extractor": {"kind": measurer.extractor.kind, "digest": measurer.extractor.digest},
        "figures": figures(reference, generated, config),
        "floor": figures(reference, reference.held_out, config),
        "accuracy_by_class": accuracy_by_class(generated, dataset.class_names),
    }
    if config.likelihood.images or config.inversion.images:
        _add_held_out_figures(report, bundle_uri, dataset, config)
    shown = min(samples, 64)
    directory.create(PICTURE, picture(report, dataset.read("test", limit=shown).images, images.read(0, shown)[0]))
    logger.info("evaluated %s", sentence(report))
    return report


def _add_held_out_figures(
    report: dict[str, Any], bundle_uri: str, dataset: ImageDataset, config: EvaluationConfig
) -> None:
    """Figures of the model on held-out images, and what `training.objective.importance` takes, where it is known."""
    import torch

    from diffusion_core.bundle import load_bundle
    from diffusion_core.evaluation.classifier import fixed_threads
    from diffusion_core.evaluation.inversion import inversion_error
    from diffusion_core.evaluation.likelihood import held_out_likelihood

    bundle = load_bundle(bundle_uri, "cuda" if torch.cuda.is_available() else "cpu")
    with fixed_threads(config.classifier.threads):
        if config.likelihood.images:
            found = held_out_likelihood(bundle, dataset, config.likelihood, config.batch_size, config.seed)
            report["figures"] |= {"bits_per_dim": found.bits_per_dim, "bits_per_dim_error": found.error}
            if found.importance:
                report["importance"] = found.importance
        if config.inversion.images:
            report["figures"]["inversion_rms"] = inversion_error(bundle, dataset, config.inversion, config.batch_size)


def _blocks(images: ImageSet, samples: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    for first in range(0, samples, _BLOCK):
        yield images.read(first, min(_BLOCK, samples - first))


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
