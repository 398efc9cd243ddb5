"""A trained model as a directory that can travel alone.

`model.safetensors` (the averaged weights), `config.json` (everything needed to use them), `samples.png`, `README.md`
(the model card), and `bundle.json`, the record of the digests of the others. The record is written last and only if
absent: it is the commit, and a directory without one is not a bundle. Nothing in a bundle can execute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from diffusion_core.config import Config, UserError, digest, execution, explain, identity, later
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.networks.config import NetworkConfig
from diffusion_core.store import Directory, layout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffusion_core.diffusion.process import GaussianProcess

SCHEMA_VERSION = 1


class DatasetReference(Config):
    """The dataset version that a model was trained on."""

    name: str = Field(description="Name of the dataset.")
    version: str = Field(description="Version of the dataset: a digest of its content and transforms.")
    uri: str = execution(description="Where the dataset version was when the model was trained.")


class BundleConfig(Config):
    """Everything besides the weights that is needed to use a model, and where the model came from."""

    schema_version: int = Field(SCHEMA_VERSION, ge=1, description="Version of the bundle's layout.")
    process: ProcessConfig = Field(description="The diffusion process that the network was trained for.")
    network: NetworkConfig = Field(description="The network.")
    image_shape: tuple[int, int, int] = Field(description="Height, width and channels of the images.")
    class_names: tuple[str, ...] = Field((), description="Names of the classes by label; empty: no class conditioning.")
    dataset: DatasetReference = Field(description="The dataset version that the model was trained on.")
    run_id: str = Field(description="The training run.")
    images_seen: int = Field(ge=0, description="Images seen in training when the bundle was exported.")
    ema_sigma_rel: float | None = later(
        None, description="Relative width of the power-function average that the weights are; none: a half-life."
    )
    ema_error: float | None = execution(
        None,
        description="Of an average that was made after training: relative L2 error of its profile over time, from 0;"
        " none: the average was kept in training.",
    )
    code_version: str = execution("", description="Version of the code that trained the model.")
    mlflow_run_id: str | None = execution(None, description="MLflow run that recorded the training.")

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unconditional model."""
        return len(self.class_names)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: the network is in evaluation mode, on the device asked for, with gradients switched off."""

    config: BundleConfig
    process: GaussianProcess
    network: nn.Module
    digest: str
    uri: str


def save_bundle(directory: Directory, config: BundleConfig, weights: dict[str, Tensor], samples_png: bytes) -> str:
    """Write a bundle and return its digest. A directory that holds a bundle already is left as it is.

    Files are created if absent. Those of an interrupted save that have other bytes are replaced, but not once a record
    names them: who saves late, without knowing that another was faster, changes nothing.

    Args:
        directory: where the bundle goes.
        config: process, network, image shape and provenance.
        weights: `state_dict` of the network, with the averaged weights, on any device.
        samples_png: a picture of a few samples, PNG.
    """
    if directory.exists(layout.BUNDLE):
        return bundle_digest(directory.uri)
    from safetensors.torch import save

    weight_bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    files = {
        layout.WEIGHTS: weight_bytes,
        layout.CONFIG: (config.model_dump_json(indent=2) + "\n").encode(),
        layout.SAMPLES: samples_png,
        layout.CARD: model_card(config).encode(),
    }
    for name, data in files.items():
        if not directory.create(name, data) and directory.read(name) != data and not directory.exists(layout.BUNDLE):
            directory.write(name, data)
    record = {
        "schema_version": SCHEMA_VERSION,
        "digest": digest(config, _sha256(weight_bytes)),
        "identity": identity(config),
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    directory.create_json(layout.BUNDLE, record)
    return bundle_digest(directory.uri)


def load_bundle(uri: str | Directory, device: str | Any = "cpu") -> Bundle:
    """Load a model for use.

    Raises:
        UserError: there is no complete bundle at `uri`, a file of it is damaged, or it was written by newer code.
    """
    from safetensors.torch import load

    from diffusion_core.diffusion.process import make_process
    from diffusion_core.networks import build_network

    place = _place(uri)
    record, config = _record(place), read_bundle_config(place)
    outputs = config.process.output_channels(config.image_shape[2])
    network = build_network(config.network, config.image_shape, config.num_classes, outputs)
    try:
        network.load_state_dict(load(_verified(place, record, layout.WEIGHTS)))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"The weights of the bundle {place.uri} do not fit its network: {first}") from error
    network = network.to(device).eval().requires_grad_(False)
    return Bundle(config, make_process(config.process), network, record["digest"], place.uri)


def bundle_digest(uri: str | Directory) -> str:
    """The digest of a bundle: of its weights and the identity of its configuration, not of where it lies.

    Reads the record only. Raises `UserError` if there is no bundle.
    """
    return str(_record(_place(uri))["digest"])


def read_bundle_config(uri: str | Directory) -> BundleConfig:
    """The configuration of a bundle, without loading its weights (or torch); `UserError` if there is no bundle."""
    place = _place(uri)
    record = _record(place)
    try:
        config = BundleConfig.model_validate_json(_verified(place, record, layout.CONFIG))
    except ValidationError as error:
        raise UserError(
            f"The bundle {place.uri} cannot be read by this version of the code: {explain(error)}"
        ) from error
    return config


def check_guide(
    name: str,
    field: str,
    guide: BundleConfig,
    process: ProcessConfig,
    image_shape: tuple[int, int, int] | None,
    class_names: Sequence[str] | None,
) -> None:
    """A bundle can guide a model, as a weaker model of the same images or as a classifier of the same noisy images.

    Args:
        name: guide or classifier, as in `GuidanceConfig`.
        field: path of the guidance, for the message.
        guide: configuration of the guiding bundle.
        process, image_shape, class_names: of the model that it guides; None where that is not known yet.

    Raises:
        UserError: the kind of network, the process, the image shape or the classes do not fit; a guide without classes
            suits every model.
    """
    classifies, field = name == "classifier", f"{field}.{name}"
    if (guide.network.kind == "classifier") != classifies:
        wanted = "classifier (network.kind)" if classifies else "model of images"
        raise UserError(f"{field}: that model is no {wanted}, but of the kind {guide.network.kind}.")
    free = ("variance", "prediction", "sigma_data") if classifies else ()
    for part in ProcessConfig.model_fields:
        theirs, ours = getattr(guide.process, part), getattr(process, part)
        if theirs != ours and part not in free:
            raise UserError(
                f"{field}: that model has process.{part} = {theirs}, and the one that it guides has {ours}."
            )
    if image_shape is not None and guide.image_shape != tuple(image_shape):
        shapes = ["x".join(map(str, shape)) for shape in (guide.image_shape, image_shape)]
        raise UserError(f"{field}: that model makes images of {shapes[0]}, and the one that it guides of {shapes[1]}.")
    if classifies and class_names is not None and not class_names:
        raise UserError(
            f"{field}: a classifier leads to a class, and the model has none: train it on labelled images; with "
            "guidance.scale 0 it is not told the label."
        )
    if guide.class_names and class_names is not None and guide.class_names != tuple(class_names):
        raise UserError(f"{field}: that model has other classes than the one that it guides.")


def check_makes_images(uri: str, bundle: BundleConfig) -> None:
    """`UserError` for the bundle of a classifier."""
    if bundle.network.kind == "classifier":
        raise UserError(f"{uri} is a classifier of noisy images: it makes none, but can guide (guidance.classifier).")


def verify_bundle(uri: str | Directory) -> str:
    """Read every file of a bundle, compare it with its record, and return the bundle's digest.

    Raises:
        UserError: there is no bundle, or a file of it is missing or damaged.
    """
    place = _place(uri)
    record = _record(place)
    for name in record["files"]:
        _verified(place, record, name)
    read_bundle_config(place)
    return str(record["digest"])


def model_card(config: BundleConfig) -> str:
    """The README of a bundle, in Markdown."""
    height, width, channels = config.image_shape
    classes = ", ".join(config.class_names) if config.class_names else "none (unconditional)"
    process = config.process
    classifies = config.network.kind == "classifier"
    title, does = ("classifier", "Classifies noisy") if classifies else ("diffusion model", "Makes")
    return f"""# A {title} of {config.dataset.name}

{does} images of {height}x{width} pixels with {channels} channel{"s" if channels > 1 else ""}.

| | |
|---|---|
| classes | {classes} |
| dataset | {config.dataset.name}, version `{config.dataset.version}` |
| training run | `{config.run_id}`, {config.images_seen:,} images seen |
| process | {process.schedule} schedule, {process.timesteps} timesteps, predicts {process.prediction} |
| network | {config.network.summary} |
{_average_row(config)}| code version | {config.code_version or "unknown"} |

![samples](samples.png)

The weights are the exponential moving average of the trained ones. Load the directory with
`diffusion_core.bundle.load_bundle(uri)`; it holds no code and no pickle. The model has seen the images of its dataset
only: what it makes shares their biases and their limits of use.
"""


def _average_row(config: BundleConfig) -> str:
    width, error = config.ema_sigma_rel, config.ema_error
    made = "" if error is None else f", made of snapshots with an error of {100 * error:.1f} %"
    return "" if width is None else f"| average | a power function of relative width {width:g}{made} |\n"


def _place(uri: str | Directory) -> Directory:
    return uri if isinstance(uri, Directory) else Directory(uri)


def _record(place: Directory) -> dict[str, Any]:
    try:
        record = place.read_json(layout.BUNDLE)
        if record.get("schema_version", 1) > SCHEMA_VERSION:
            raise UserError(
                f"The bundle {place.uri} has schema version {record['schema_version']}; "
                f"this code reads up to {SCHEMA_VERSION}."
            )
        weights = record["files"][layout.WEIGHTS]["sha256"]
        complete = record["digest"] == digest(record["identity"], weights) and layout.CONFIG in record["files"]
    except FileNotFoundError:
        raise UserError(f"{place.uri} is not a model bundle: there is no {layout.BUNDLE} in it.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{place.uri} is not a model bundle: its {layout.BUNDLE} cannot be read or was changed.")
    return dict(record)


def _verified(place: Directory, record: dict[str, Any], name: str) -> bytes:
    try:
        data = place.read(name)
    except FileNotFoundError:
        raise UserError(f"The bundle {place.uri} is damaged: {name} is missing.") from None
    if _sha256(data) != record["files"][name]["sha256"]:
        raise UserError(f"The bundle {place.uri} is damaged: {name} differs from what {layout.BUNDLE} says.")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
