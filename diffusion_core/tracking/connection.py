"""The connection to MLflow: where the record is, how it is made, and how soon one learns that it is away."""

from __future__ import annotations

import base64
import logging
import os
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

_log = logging.getLogger(__name__)


class Unreachable(UserError):
    """The MLflow server does not answer; it may later."""


_SQLITE = "sqlite:///"
_REACH_TIMEOUT_S = 10  # a busy server answers late; one that refuses does so at once


def tracking_uri(store: str | Directory) -> str:
    """Where runs and models are recorded: MLFLOW_TRACKING_URI, or a SQLite file in a local store.

    Raises:
        UserError: the store is not local and the variable is not set.
    """
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    place = directory(store)
    if not place.is_local:
        raise UserError(
            f"The store {place.uri} is not local, so MLflow needs a server: set MLFLOW_TRACKING_URI in the environment."
        )
    return f"{_SQLITE}{place.local_path / layout.MLFLOW_DATABASE}"


def without_secrets(value: Any) -> str:
    """A value as text, in which every URI has lost its user, password and query."""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s@\"']*@", r"\1", str(value))
    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?\"']*)\?[^\s\"']*", r"\1", text)


def client(store: str | Directory, create: bool = True) -> Any:
    """A client of the record. With `create=False` None, without touching anything, if there is no database yet.

    Raises:
        UserError: the server cannot be reached or refuses the credentials in the environment.
    """
    uri = tracking_uri(store)
    if uri.startswith(_SQLITE):
        path = Path(uri.removeprefix(_SQLITE))
        if not path.exists():
            if not create:
                return None
            _make_database(path, _artifact_root(store) or str(path.parent / layout.MLFLOW_ARTIFACTS))
    elif uri.startswith(("http://", "https://")):
        _check_server(uri)
    _quieten()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ensure_experiment(recorder: MlflowClient, store: str | Directory, name: str) -> Experiment:
    """The experiment of this name, made if absent; `UserError` if it was deleted."""
    from mlflow.exceptions import MlflowException

    found = recorder.get_experiment_by_name(name)
    if found is None:
        try:
            recorder.create_experiment(name, artifact_location=_artifact_root(store))
        except MlflowException as error:  # another process may have made it in between
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = recorder.get_experiment_by_name(name)
    if found is None:
        raise RuntimeError(f"MLflow does not return the experiment {name!r} that exists")
    if found.lifecycle_stage != "active":
        raise UserError(f"The MLflow experiment {name!r} was deleted: restore it in MLflow or choose another name.")
    return found


def _artifact_root(store: str | Directory) -> str | None:
    """Where artifacts go when the record is a SQLite file; a server decides that itself."""
    place = directory(store)
    if not tracking_uri(store).startswith(_SQLITE):
        return None
    artifacts = place / layout.MLFLOW_ARTIFACTS
    return artifacts.local_path.as_uri() if place.is_local else artifacts.uri


def _make_database(path: Path, artifact_root: str) -> None:
    """Make MLflow's SQLite database aside and put it in place complete: no crash or race leaves half of one."""
    _quieten()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".tmp-{uuid.uuid4().hex}.db")
    try:
        SqlAlchemyStore(f"{_SQLITE}{aside}", artifact_root).engine.dispose()
        os.link(aside, path)
    except FileExistsError:
        _log.debug("another process made %s first", path)
    finally:
        aside.unlink(missing_ok=True)


@lru_cache(maxsize=8)
def _check_server(uri: str) -> None:
    """MLflow's own client would retry for minutes; this says within seconds that a server is away."""
    shown = without_secrets(uri).rstrip("/")
    request = urllib.request.Request(f"{shown}/api/2.0/mlflow/experiments/get?experiment_id=0")
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    embedded = re.match(r"https?://([^/\s@:]*):([^/\s@]*)@", uri)
    if embedded:
        user, password = embedded.groups()
    if user is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=_REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"The MLflow server {shown} refuses the credentials: see MLFLOW_TRACKING_USERNAME and _PASSWORD."
            ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(f"The MLflow server {shown} (MLFLOW_TRACKING_URI) cannot be reached: {reason}.") from None


def _quieten() -> None:
    """No usage statistics over the network, no page of chatter in the log. Call before importing mlflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    noisy = ("store.db.utils", "store.model_registry.abstract_store", "models.signature", "pyfunc")
    for name in ("alembic", *(f"mlflow.{part}" for part in noisy)):
        logging.getLogger(name).setLevel(logging.WARNING)


def all_pages(search: Any, **arguments: Any) -> Sequence[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = search(page_token=token, **arguments)
        found.extend(page)
        token = page.token
        if not token:
            return found


def directory(store: str | Directory) -> Directory:
    return store if isinstance(store, Directory) else Directory(store)
