"""The record of training runs in MLflow."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_core.config import UserError
from diffusion_core.store import Directory
from diffusion_core.tracking.connection import Unreachable, client, ensure_experiment, without_secrets
from diffusion_core.tracking.flow_run import FlowRun
from diffusion_core.tracking.outbox import Figures, Message, Outbox

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

STEP = "images_seen"  # logged with every step: its latest value says which steps are recorded
_MAX_PARAMS, _MAX_PARAM_LENGTH = 100, 6000
_PATIENCE_S = {"FINISHED": 60.0}  # for what is left when a run ends
_LITTLE_PATIENCE_S = 5.0  # of a run that was stopped: somebody waits for its end
_NAMED = 8


class RunRecorder:
    """Records one training run in MLflow. Making it again for the same run continues the record.

    Steps are counted in images. A step that is already recorded is skipped, so a loop that repeats some steps after a
    crash leaves no duplicates. Nothing that is told to it waits for MLflow or fails because of it: figures and pictures
    are delivered in the background, and `finish` gives MLflow a last chance before it says what is not recorded.

    Attributes:
        mlflow_run_id: id of the MLflow run; hand it back on resume.
        last_step: the last step that is recorded or about to be, -1 if there is none.

    Raises:
        UserError: a new run cannot be made, or MLflow does not know the one to continue. That MLflow is away is no
            error for a run that continues.
    """

    def __init__(
        self,
        store: str | Directory,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        mlflow_run_id: str | None = None,
        asked_by: FlowRun | None = None,
    ) -> None:
        self._store, self._params, self._tags = store, flatten(params or {}), dict(tags or {})
        self._asked_by = asked_by
        self._figures, self._pictures = Outbox(), Outbox()  # figures do not wait for pictures
        self.last_step = self._recorded = -1
        if mlflow_run_id is None:
            experiment_id = ensure_experiment(self._client, store, experiment).experiment_id
            mlflow_run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        self.mlflow_run_id: str = mlflow_run_id
        self._begin_soon()

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Record figures at a step; nothing happens if this step or a later one is recorded."""
        if images_seen <= self.last_step:
            return
        self.last_step = images_seen
        figures = Figures(images_seen, int(time.time() * 1000), {name: float(value) for name, value in metrics.items()})
        self._figures.post(
            Message(f"the figures at {images_seen} images", partial(self._send_figures, figures), figures)
        )

    def image(self, name: str, png: bytes) -> None:
        """Keep a PNG picture with the run, as the artifact `images/<name>.png`; it replaces one of the same name."""
        file = name if name.endswith(".png") else f"{name}.png"
        self._pictures.post(Message(f"the picture {file}", partial(self._send_picture, file, png)))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED.

        Waits until everything is recorded, but not for ever. What is not then is named in a warning.
        """
        self._figures.post(Message(f"that it is {status}", partial(self._send_status, status)))
        if left := self.settle(_PATIENCE_S.get(status, _LITTLE_PATIENCE_S)):
            more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            named = ", ".join(left[:_NAMED]) + more
            _log.warning("MLflow could not be told, and will not show of the run %s: %s.", self.mlflow_run_id, named)

    def settle(self, seconds: float) -> list[str]:
        """Wait until everything is recorded, for so long at most; returns what is not, in words."""
        deadline = time.monotonic() + seconds
        left = self._figures.settle(seconds)
        return [message.what for message in left + self._pictures.settle(max(0.0, deadline - time.monotonic()))]

    def unrecorded(self) -> list[tuple[int, dict[str, float]]]:
        """Steps and figures that MLflow has not taken yet, to be told again by whoever continues this run."""
        waiting = [message.figures for message in self._figures.pending() if message.figures is not None]
        return [(figures.images_seen, figures.metrics) for figures in waiting]

    def checkpointing(self) -> None:
        """Nothing to do: a checkpoint has what is `unrecorded`."""

    @cached_property
    def _client(self) -> MlflowClient:
        made: MlflowClient = client(self._store)
        return made

    def _begin_soon(self) -> None:
        """At once, or when MLflow is back."""
        from mlflow.exceptions import MlflowException

        try:
            self._begin()
        except (Unreachable, MlflowException) as error:
            _log.warning("MLflow is away, the run is recorded when it is back: %s", without_secrets(error))
            self._figures.post(Message("that it continues", self._begin))

    def _begin(self) -> None:
        run = existing_run(self._client, self.mlflow_run_id)
        self._recorded = int(run.data.metrics.get(STEP, -1))
        self.last_step = max(self.last_step, self._recorded)
        self._client.update_run(self.mlflow_run_id, status="RUNNING")
        self._add_params(known=run.data.params)
        asked = self._asked_by.tags(run.data.tags) if self._asked_by else {}
        for key, value in {**self._tags, **asked}.items():
            self._client.set_tag(self.mlflow_run_id, key, without_secrets(value))

    def _send_figures(self, figures: Figures) -> None:
        from mlflow.entities import Metric

        if figures.images_seen <= self._recorded:  # found out only when MLflow was back
            return
        values = {**figures.metrics, STEP: float(figures.images_seen)}
        metrics = [Metric(key, value, figures.time_ms, figures.images_seen) for key, value in values.items()]
        self._client.log_batch(self.mlflow_run_id, metrics=metrics)
        self._recorded = figures.images_seen

    def _send_picture(self, file: str, png: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            path.write_bytes(png)
            self._client.log_artifact(self.mlflow_run_id, str(path), "images")

    def _send_status(self, status: str) -> None:
        self._client.set_terminated(self.mlflow_run_id, status)

    def _add_params(self, known: Mapping[str, str]) -> None:
        """Parameters cannot be changed in MLflow: of a continued run those of the first start stay."""
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in self._params.items() if key not in known]
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


def end_run(store: str | Directory, mlflow_run_id: str, status: str) -> None:
    """Mark a run that says RUNNING as FAILED or KILLED; one that has ended stays as it is."""
    recorder = client(store)
    if existing_run(recorder, mlflow_run_id).info.status == "RUNNING":
        recorder.set_terminated(mlflow_run_id, status)


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
