"""The registry of models: one version per bundle, the alias `candidate`, and `champion` with its history."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusion_core
from diffusion_core.bundle import BundleConfig, bundle_digest, read_bundle_config
from diffusion_core.config import Config, UserError
from diffusion_core.store import Directory, layout
from diffusion_core.tracking.connection import all_pages, client, without_secrets
from diffusion_core.tracking.models import find_version, model_aliases, model_versions
from diffusion_core.tracking.runs import existing_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

CHAMPION, CANDIDATE = "champion", "candidate"
HISTORY = "champion_history"  # tag of the registered model: JSON list of version numbers, the present champion last
ROLLED_BACK = "rolled_back"  # tag of a version that rollback took the alias from
_HISTORY_LENGTH = 100
_REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "safetensors", "tenacity", "torch")


class ServingDefaults(Config):
    """How a registered model samples unless it is told otherwise: as it was evaluated."""

    sampler: dict[str, Any]
    guidance_scale: float
    batch_size: int


def register_version(
    store: str | Directory,
    model: str,
    bundle_uri: str,
    mlflow_run_id: str,
    defaults: ServingDefaults,
    tags: Mapping[str, Any] | None = None,
) -> tuple[int, bool]:
    """Make a version of a registered model from a bundle; a bundle that has a version already keeps it.

    Callers see to it that one process at a time registers versions of a model.

    Args:
        model: name of the registered model; made if absent.
        mlflow_run_id: the MLflow run that trained the bundle.
        defaults: how the model samples unless `predict` is told otherwise.
        tags: more tags for the version.

    Returns:
        The version's number, and whether it is new.
    """
    _check_name(model)
    place, wanted = Directory(bundle_uri), bundle_digest(bundle_uri)
    for version in model_versions(store, model):
        if version.tags.get("bundle_digest") == wanted:
            return int(version.version), False
    registry, config = client(store), read_bundle_config(place)
    existing_run(registry, mlflow_run_id)
    _ensure_model(registry, model)
    logged = _logged_model(registry, place, wanted, config, mlflow_run_id, model, defaults)
    own = {
        "bundle_digest": wanted,
        "bundle_uri": place.uri,
        "dataset": config.dataset.name,
        "dataset_version": config.dataset.version,
        "dataset_uri": config.dataset.uri,
        "run_id": config.run_id,
        "images_seen": config.images_seen,
        "code_version": config.code_version,
    }
    made = registry.create_model_version(
        model,
        source=logged.artifact_location,  # "models:/<id>" would be looked up at the process-wide tracking URI
        run_id=mlflow_run_id,
        model_id=logged.model_id,
        tags={key: without_secrets(value) for key, value in {**own, **(tags or {})}.items()},
        description=f"{config.dataset.name}, {config.images_seen:,} images seen, run {config.run_id}",
    )
    return int(made.version), True


def tag_version(store: str | Directory, model: str, version: int, tags: Mapping[str, Any]) -> None:
    """Set tags of a version."""
    registry = client(store)
    for key, value in tags.items():
        registry.set_model_version_tag(model, str(version), key, without_secrets(value))


def set_alias(store: str | Directory, model: str, alias: str, version: int) -> None:
    """Let an alias name a version. The alias champion is left to `promote` and `rollback`: they keep its history."""
    if alias == CHAMPION:
        raise UserError("The alias champion is set by promote and rollback, which keep its history.")
    client(store).set_registered_model_alias(model, alias, str(version))


def champion(store: str | Directory, model: str) -> int | None:
    """The version that holds the alias champion; None if there is none, or no such model."""
    return model_aliases(store, model).get(CHAMPION) if model_versions(store, model) else None


def champion_history(store: str | Directory, model: str) -> list[int]:
    """Versions that were champion, the oldest first; the last one is the present champion.

    The alias is the truth, and is changed before the history: what the two disagree in is mended here.
    """
    present = champion(store, model)
    if present is None:
        return []
    text = client(store).get_registered_model(model).tags.get(HISTORY, "[]")
    kept = [int(version) for version in json.loads(text)]
    if present in kept:
        return kept[: len(kept) - kept[::-1].index(present)]
    return [*kept, present]


def champion_before(store: str | Directory, model: str) -> int | None:
    """The version that was champion before the present one; None if there was none."""
    earlier = champion_history(store, model)[:-1]
    return earlier[-1] if earlier else None


def promote(model: str, version: int, store: str | Directory) -> None:
    """Make a version the champion, whatever the gate said. `UserError` if there is no such version."""
    find_version(f"models:/{model}/{version}", store)
    history = champion_history(store, model)
    if was_rolled_back(store, model, version):
        client(store).delete_model_version_tag(model, str(version), ROLLED_BACK)
    if not history or history[-1] != version:
        _set_champion(store, model, [*history, version])


def was_rolled_back(store: str | Directory, model: str, version: int) -> bool:
    """True if the version was champion and `rollback` ended that: then only `promote` brings it back, no gate."""
    return ROLLED_BACK in find_version(f"models:/{model}/{version}", store).tags


def rollback(model: str, store: str | Directory) -> int:
    """Give the alias champion back to the version that held it before, and return that version.

    Raises:
        UserError: there is no champion, or none before it that still exists.
    """
    history = champion_history(store, model)
    if not history:
        raise UserError(f"The model {model!r} has no champion, so there is nothing to roll back.")
    existing = {int(version.version) for version in model_versions(store, model)}
    earlier = [version for version in history[:-1] if version in existing]
    if not earlier:
        raise UserError(f"Version {history[-1]} is the first champion of the model {model!r}: there is none before it.")
    tag_version(store, model, history[-1], {ROLLED_BACK: f"to version {earlier[-1]}"})
    _set_champion(store, model, earlier)
    return earlier[-1]


def _set_champion(store: str | Directory, model: str, history: list[int]) -> None:
    registry = client(store)
    registry.set_registered_model_alias(model, CHAMPION, str(history[-1]))
    registry.set_registered_model_tag(model, HISTORY, json.dumps(history[-_HISTORY_LENGTH:]))


def _check_name(model: str) -> None:
    if not model or any(letter in model for letter in "/:@'\"") or model in (".", ".."):
        raise UserError(f"model: {model!r} is not accepted as a name: it must not contain / : @ or quotes.")


def _ensure_model(registry: MlflowClient, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        registry.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _logged_model(
    registry: MlflowClient,
    place: Directory,
    wanted: str,
    config: BundleConfig,
    mlflow_run_id: str,
    name: str,
    defaults: ServingDefaults,
) -> LoggedModel:
    """The MLflow model that holds this bundle: one that an interrupted registration left complete, or a new one."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment_id = registry.get_run(mlflow_run_id).info.experiment_id
    found = all_pages(
        registry.search_logged_models,
        experiment_ids=[experiment_id],
        filter_string=f"tags.bundle_digest = '{wanted}' AND source_run_id = '{mlflow_run_id}'",
    )
    complete = [logged for logged in found if logged.status == LoggedModelStatus.READY]  # its filter does not work
    if complete:
        return complete[0]
    logged = registry.create_logged_model(
        experiment_id, name=name, source_run_id=mlflow_run_id, tags={"bundle_digest": wanted}, model_type="diffusion"
    )
    with tempfile.TemporaryDirectory() as folder:
        _save_pyfunc(Path(folder), place, wanted, config, logged, mlflow_run_id, defaults)
        registry.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
    registry.finalize_logged_model(logged.model_id, "READY")
    registry.log_outputs(mlflow_run_id, models=[LoggedModelOutput(logged.model_id, step=config.images_seen)])
    return logged


def _save_pyfunc(
    folder: Path,
    place: Directory,
    wanted: str,
    config: BundleConfig,
    logged: LoggedModel,
    mlflow_run_id: str,
    defaults: ServingDefaults,
) -> None:
    """Write the MLflow model to `<folder>/model`: this package's code, the bundle, and no pickle."""
    os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
    import mlflow
    from mlflow.models import Model

    package, copy = Path(diffusion_core.__file__).parent, folder / "bundle"
    for name in [*place.read_json(layout.BUNDLE)["files"], layout.BUNDLE]:
        place.download(name, copy / name)
    if bundle_digest(str(copy)) != wanted:
        raise UserError(f"The bundle {place.uri} changed while it was being registered.")
    mlflow.pyfunc.save_model(
        path=str(folder / "model"),
        python_model=str(package / "serving.py"),
        artifacts={"bundle": str(copy)},
        code_paths=[str(package)],
        pip_requirements=pinned_requirements(),
        signature=signature(config, defaults),
        input_example=input_example(config, defaults),
        model_config=defaults.model_dump(mode="json"),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            run_id=mlflow_run_id,
            model_id=logged.model_id,
        ),
    )


def pinned_requirements() -> list[str]:
    """The packages that the served model imports, at the versions installed here (without a build tag such as +cpu)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def signature(config: BundleConfig, defaults: ServingDefaults) -> ModelSignature:
    """Rows in, images out. Of a model without classes only `image_id` is asked."""
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    conditional = bool(config.class_names)
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.long, "label")] if conditional else []
    columns.append(ColSpec(DataType.long, "image_id", required=not conditional))
    columns.append(ColSpec(DataType.long, "seed", required=False))
    params = [
        ParamSpec("steps", DataType.long, int(defaults.sampler["steps"])),
        ParamSpec("guidance_scale", DataType.double, float(defaults.guidance_scale)),
        ParamSpec("seed", DataType.long, 0),
    ]
    images = TensorSpec(numpy.dtype("uint8"), (-1, *config.image_shape))
    return ModelSignature(inputs=Schema(columns), outputs=Schema([images]), params=ParamSchema(params))


def input_example(config: BundleConfig, defaults: ServingDefaults) -> tuple[Any, dict[str, Any]]:
    """Two images: of the first and the last class, in a few steps."""
    import pandas

    rows: dict[str, list[int]] = {"image_id": [0, 1]}
    if config.class_names:
        rows = {"label": [0, config.num_classes - 1], **rows}
    params = {
        "steps": min(4, int(defaults.sampler["steps"])),
        "guidance_scale": float(defaults.guidance_scale),
        "seed": 0,
    }
    return pandas.DataFrame(rows, dtype="int64"), params
