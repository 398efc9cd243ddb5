"""What identifies a feature extractor, without making it: no torch here, so that finished work is found at once."""

from __future__ import annotations

import hashlib

from diffusion_core.config import UserError, digest
from diffusion_core.evaluation.config import ClassifierConfig, EvaluationConfig, Extractor
from diffusion_core.store import Directory


def extractor_identity(config: EvaluationConfig, dataset_version: str) -> str:
    """The digest of the extractor that a configuration means for a dataset version."""
    if config.extractor is Extractor.inception:
        return weights_identity(read_weights(str(config.inception_weights)))
    return classifier_identity(config.classifier, dataset_version)


def classifier_identity(config: ClassifierConfig, dataset_version: str) -> str:
    """A classifier is known by what it is trained on and how."""
    return digest("classifier", dataset_version, config)


def weights_identity(data: bytes) -> str:
    """Inception is known by the content of its weights file, wherever it lies."""
    return digest("inception", hashlib.sha256(data).hexdigest())


def distance_name(config: EvaluationConfig) -> str:
    """What the Fréchet distance is called: FID with Inception's features, and only then."""
    return "fid" if config.extractor is Extractor.inception else "frechet_distance"


def kernel_name(config: EvaluationConfig) -> str:
    """What the kernel distance is called: KID with Inception's features, and only then."""
    return "kid" if config.extractor is Extractor.inception else "kernel_distance"


def read_weights(uri: str) -> bytes:
    """The content of a weights file; `UserError` if there is none."""
    parent, _, name = uri.rpartition("/")
    place = Directory(parent or ("/" if uri.startswith("/") else "."))
    try:
        return place.read(name)
    except FileNotFoundError:
        raise UserError(f"evaluation.inception_weights: the file {uri} does not exist.") from None
