"""What can be known to go wrong before anything starts: checked in seconds, without Prefect or torch.

Each raises a `UserError` that names the field, its value and what is accepted. The checks of the stages are made of
these; they run once, in the command before it even starts Prefect, or else at the beginning of the flow.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from diffusion_core.catalog import find
from diffusion_core.config import UserError
from diffusion_core.data.config import DatasetConfig, SourceConfig, SourceKind, SplitSource
from diffusion_core.diffusion.config import GuidanceConfig, ProcessConfig, check_guidance_scale
from diffusion_core.evaluation.config import EvaluationConfig
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.jobs.backend import BackendConfig, BackendKind
from diffusion_core.jobs.cluster.session import check_cluster
from diffusion_core.jobs.ray_jobs import check_jobs_api, jobs_address
from diffusion_core.jobs.request import Request, Resources
from diffusion_core.networks.config import NetworkConfig, check_image_size
from diffusion_core.store import Directory, check_reachable
from diffusion_core.tracking import tracking_uri

if TYPE_CHECKING:
    from diffusion_core.bundle import BundleConfig

CONNECT_TIMEOUT_S = 2.0
LISTED_AT_ONCE = 5_000
DIGITS_SIZE = (8, 8)


def check_measured(
    bundle_uri: str,
    dataset_uri: str,
    evaluation: EvaluationConfig,
    request: Request,
    backend: BackendConfig,
    mlflow: bool,
) -> BundleConfig:
    """The configuration of a bundle that is to be measured, which the dataset and the extractor suit."""
    from diffusion_core.bundle import check_makes_images, read_bundle_config
    from diffusion_core.data.shards import open_dataset
    from diffusion_core.stages.work.evaluate import check_comparable

    check_place(request, "evaluate", backend, mlflow)
    bundle, dataset = read_bundle_config(bundle_uri), open_dataset(dataset_uri)
    check_makes_images(bundle_uri, bundle)
    check_comparable(bundle, dataset)
    if not dataset.num_rows("test"):
        raise UserError(f"The dataset {dataset_uri} has no test split, and the figures need held-out images.")
    check_evaluation(evaluation)
    return bundle


def check_place(request: Request, resources: str, backend: BackendConfig, mlflow: bool = True) -> None:
    """The store, the services and the room for the workers are there.

    Args:
        resources: field of the configuration's `resources` that the request's are.
        mlflow: whether the stage asks MLflow.
    """
    check_store(request.store)
    check_services(request.store, backend, mlflow)
    check_resources(f"resources.{resources}", request.resources, backend)


def check_store(store: str) -> None:
    """The store can be reached and written."""
    place = Directory(store)
    if place.is_local and Path(place.uri).exists() and not Path(place.uri).is_dir():
        raise UserError(f"store: {store} is a file; give a folder, or s3://bucket/prefix.")
    check_reachable(place.uri)


def check_source(source: SourceConfig, store: str | None = None) -> None:
    """There is something to read where the images should come from."""
    if source.kind is SourceKind.DIGITS:
        if importlib.util.find_spec("sklearn") is None:
            raise UserError("source.kind: digits needs scikit-learn, which is not installed: pip install scikit-learn.")
        return
    uri = str(source.uri)
    place = Directory(uri)
    if place.is_local:
        _check_local_source(uri, Path(place.uri))
    else:
        check_reachable(uri, writable=False)
    if len(list(islice(place.list(), LISTED_AT_ONCE))) < LISTED_AT_ONCE:  # the job lists a larger one soon enough
        from diffusion_core.data.sources import open_source

        open_source(source, store)


def _check_local_source(uri: str, path: Path) -> None:
    if not path.exists():
        raise UserError(f"source.uri: {uri} does not exist; give a folder or file of images, or an s3:// URI.")
    if not os.access(path, os.R_OK):
        raise UserError(f"source.uri: {uri} cannot be read: permission is denied.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"source.uri: the file {uri} is empty.")


def check_size(source: SourceConfig, dataset: DatasetConfig, network: NetworkConfig) -> None:
    """The network can halve the images as often as it has levels."""
    size = dataset.size
    if source.kind is SourceKind.DIGITS:
        size = size or DIGITS_SIZE
        if max(size) > DIGITS_SIZE[0] and not dataset.allow_upscale:
            raise UserError(
                f"dataset.image_size: {dataset.image_size} is larger than the bundled digits, which are 8x8; "
                "give at most 8, or set dataset.allow_upscale=true."
            )
    if size:
        check_image_size(network, *size)


def check_held_out(source: SourceConfig, dataset: DatasetConfig) -> None:
    """The evaluation compares with held-out images, so there have to be some."""
    no_split_of_its_own = source.kind is SourceKind.DIGITS or source.splits is SplitSource.NONE
    if no_split_of_its_own and dataset.test_fraction == 0:
        raise UserError("dataset.test_fraction: 0 leaves no held-out images for the evaluation; give 0.1, for example.")


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """The weights file of a chosen extractor is there."""
    if not evaluation.inception_weights:
        return
    parent, _, name = evaluation.inception_weights.rpartition("/")
    if not Directory(parent or ".").exists(name):
        raise UserError(f"evaluation.inception_weights: there is no file {evaluation.inception_weights}.")


def known_classes(source: SourceConfig) -> Sequence[str] | None:
    """The class names that a source will have, where they are known before it is read."""
    if source.class_names is not None:
        return source.class_names
    return [str(digit) for digit in range(10)] if source.kind is SourceKind.DIGITS else None


def check_labels(generation: GenerationConfig, class_names: Sequence[str] | None) -> None:
    """The labels to generate are classes of the model."""
    if class_names is not None:
        from diffusion_core.generation.labels import resolve_labels

        resolve_labels(generation, class_names)


def check_guidance(
    field: str,
    guidance: GuidanceConfig,
    process: ProcessConfig,
    image_shape: tuple[int, int, int] | None,
    class_names: Sequence[str] | None,
    store: str,
) -> None:
    """The scale suits the model, and the models that guide are there and suit it too."""
    if class_names is not None:
        check_guidance_scale(field, guidance, class_names)
    for name, reference in guidance.models.items():
        from diffusion_core.bundle import check_guide, read_bundle_config

        guide = read_bundle_config(bundle_of(reference, store))
        check_guide(name, field, guide, process, image_shape, class_names)


def check_unmoved(field: str, reference: str | None, model: str) -> None:
    """A pipeline uses no alias that it may move itself: done again, it would be another run, or another set."""
    if reference and (find.registered(reference) or "").startswith(f"models:/{model}@"):
        raise UserError(
            f"{field}: {reference} means another version once this pipeline registers its own, and the same command "
            f"would not do the same again: name a version, as models:/{model}/1."
        )


def check_init_from(
    init_from: str | None, network: NetworkConfig, process: ProcessConfig, channels: int, store: str
) -> None:
    """Training can only start from weights that fit."""
    if init_from is None:
        return
    from diffusion_core.bundle import read_bundle_config
    from diffusion_core.training.run import check_start

    check_start(read_bundle_config(bundle_of(init_from, store)), network, process, channels)


def bundle_of(model: str, store: str) -> str:
    """The URI of the bundle that a reference names."""
    return find.bundle_uri(model, store)


def check_resources(field: str, resources: Resources, backend: BackendConfig) -> None:
    """This machine alone can hold the workers, if it is alone; a cluster is asked by the job."""
    if backend.kind is not BackendKind.local or os.environ.get("RAY_ADDRESS"):
        return
    gpus, cpus = _gpus(), os.cpu_count() or 1
    if resources.gpus_per_worker * resources.workers > gpus:
        raise UserError(
            f"{field}.gpus_per_worker: {resources.gpus_per_worker:g} for each of {resources.workers} workers, but this "
            f"machine has {gpus or 'no'} GPU{'s' if gpus > 1 else ''}; set it to 0, or set RAY_ADDRESS to a cluster."
        )
    if resources.cpus_per_worker * resources.workers > cpus:
        raise UserError(
            f"{field}.workers: {resources.workers} workers of {resources.cpus_per_worker:g} CPU cores, but this "
            f"machine has {cpus}; ask for fewer, or set RAY_ADDRESS to a cluster."
        )
    if resources.accelerator_type and not gpus:
        raise UserError(
            f"{field}.accelerator_type: this machine has no {resources.accelerator_type}, nor any other GPU."
        )


def check_services(store: str, backend: BackendConfig, mlflow: bool = True) -> None:
    """The services that the environment names answer."""
    check_address("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"), default_port=6379)
    check_cluster()
    if backend.kind is BackendKind.jobs:
        if jobs_address() is None:
            raise UserError(
                "backend.kind: jobs needs the environment variable RAY_API_SERVER_ADDRESS, as http://head:8265."
            )
        if Directory(store).is_local:
            _check_shared(store)
        check_address("RAY_API_SERVER_ADDRESS", jobs_address(), default_port=8265)
        check_jobs_api()
    if mlflow and (record := tracking_uri(store)).startswith(("http://", "https://")):
        check_address("MLFLOW_TRACKING_URI", record, default_port=443 if record.startswith("https") else 80)


def _check_shared(store: str) -> None:
    if not os.path.isabs(store):
        raise UserError(
            f"store: {store} is a relative path, which means nothing on a cluster; give s3://bucket/prefix."
        )


def check_address(variable: str, address: str | None, default_port: int) -> None:
    """Something answers at the address that an environment variable holds, if it holds one."""
    if not address or address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or default_port
    except ValueError:
        host, port = None, 0
    if not host:
        raise UserError(f"{variable}: {address} is not an address; give host:port, or a URL.")
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{variable}: nothing answers at {address} ({why[:1].lower() + why[1:]}).") from None


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    with suppress(OSError):
        return sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    return 0


def check_readable(store: str) -> None:
    """The store is there to be looked at."""
    place = Directory(store)
    if place.is_local and not Path(place.uri).is_dir():
        raise UserError(f"store: there is no folder {store}; give the root of a store, as --store ./store.")
    check_reachable(place.uri, writable=False)
