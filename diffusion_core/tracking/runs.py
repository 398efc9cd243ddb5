"""The record of training runs in MLflow."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_core.config import UserError
from diffusion_core.storage import Directory
from diffusion_core.tracking.connection import client, ensure_experiment, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

STEP = "images_seen"  # logged with every step: its latest value says which steps are recorded
_MAX_PARAMS, _MAX_PARAM_LENGTH = 100, 6000


class RunRecorder:
    """Records one training run in MLflow. Making it again for the same run continues the record.

    Steps are counted in images. A step that is already recorded is skipped, so a loop that repeats some steps after a
    crash leaves no duplicates. When the server is away for a while the steps are kept and written later.

    Attributes:
        mlflow_run_id: id of the MLflow run; hand it back on resume.
        last_step: the last step that is recorded, -1 if there is none.
    """

    def __init__(
        self,
        store: str | Directory,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        mlflow_run_id: str | None = None,
    ) -> None:
        self._client = client(store)
        if mlflow_run_id is None:
            experiment_id = ensure_experiment(self._client, store, experiment).experiment_id
            mlflow_run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        run = existing_run(self._client, mlflow_run_id)
        self.mlflow_run_id: str = mlflow_run_id
        self.last_step = int(run.data.metrics.get(STEP, -1))
        self._pending: list[Any] = []
        self._client.update_run(mlflow_run_id, status="RUNNING")
        self._add_params(flatten(params or {}), known=run.data.params)
        for key, value in (tags or {}).items():
            self._client.set_tag(mlflow_run_id, key, without_secrets(value))

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Record figures at a step; nothing happens if this step or a later one is recorded."""
        from mlflow.entities import Metric

        if images_seen <= self.last_step:
            return
        now = int(time.time() * 1000)
        figures = {**metrics, STEP: images_seen}
        self._pending.append([Metric(key, float(value), now, images_seen) for key, value in figures.items()])
        self.last_step = images_seen
        self._flush(patient=True)

    def image(self, name: str, png: bytes) -> None:
        """Keep a PNG picture with the run, as the artifact `images/<name>.png`; it replaces one of the same name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name if name.endswith(".png") else f"{name}.png")
            path.write_bytes(png)
            self._client.log_artifact(self.mlflow_run_id, str(path), "images")

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED. Everything recorded is written when it returns."""
        self._flush(patient=False)
        self._client.set_terminated(self.mlflow_run_id, status)

    def _flush(self, patient: bool) -> None:
        from mlflow.exceptions import MlflowException

        while self._pending:
            try:
                self._client.log_batch(self.mlflow_run_id, metrics=self._pending[0])
            except MlflowException as error:
                if not patient:
                    raise
                _log.warning("MLflow does not take figures now, they are kept for later: %s", without_secrets(error))
                return
            self._pending.pop(0)

    def _add_params(self, params: dict[str, str], known: Mapping[str, str]) -> None:
        """Parameters cannot be changed in MLflow: of a continued run those of the first start stay."""
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self.mlflow_run_id, params=new[start : start + _MAX_PARAMS])


def record_figures(store: str | Directory, mlflow_run_id: str, figures: Mapping[str, float], step: int) -> None:
    """Attach figures to a run at a step. Figures that the run shows already are not written again."""
    from mlflow.entities import Metric

    recorder = client(store)
    known = existing_run(recorder, mlflow_run_id).data.metrics
    now = int(time.time() * 1000)
    new = [Metric(key, float(value), now, step) for key, value in figures.items() if known.get(key) != float(value)]
    if new:
        recorder.log_batch(mlflow_run_id, metrics=new)


def existing_run(recorder: MlflowClient, mlflow_run_id: str) -> Run:
    """An MLflow run by its id; `UserError` if MLflow does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return recorder.get_run(mlflow_run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        where = without_secrets(recorder.tracking_uri)
        raise UserError(
            f"MLflow at {where} has no run {mlflow_run_id!r}: set MLFLOW_TRACKING_URI to where the run was recorded."
        ) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as MLflow parameters: `{"network": {"dropout": 0}}` becomes `{"network.dropout": "0"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = without_secrets(value)[:_MAX_PARAM_LENGTH]
    return flat
