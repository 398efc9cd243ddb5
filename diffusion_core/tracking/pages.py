"""The pages on which an MLflow server shows what it holds.

They are those of the tracking server, unless DIFFUSION_MLFLOW_UI names another URL for people to look at: of a server
that shows a record which jobs open as a file, or that browsers reach by another name than jobs do.
"""

from __future__ import annotations

import logging
import os
from urllib.parse import quote

from diffusion_core.config import UserError
from diffusion_core.store import Directory
from diffusion_core.tracking.connection import client, tracking_uri, without_secrets
from diffusion_core.tracking.runs import existing_run

UI = "DIFFUSION_MLFLOW_UI"

_log = logging.getLogger(__name__)


def page(reference: str, store: str | Directory) -> str | None:
    """URL, without credentials, of the page that shows `runs:/<id>` or `models:/<name>/<version>`.

    None if no server is known, or MLflow does not say where the run is.
    """
    address = os.environ.get(UI) or tracking_uri(store)
    if not address.startswith(("http://", "https://")):
        return None
    start = f"{without_secrets(address).rstrip('/')}/#"
    kind, _, thing = reference.partition(":/")
    if kind == "models":
        name, _, version = thing.rpartition("/")
        return f"{start}/models/{quote(name)}/versions/{version}"
    from mlflow.exceptions import MlflowException

    try:
        experiment = existing_run(client(store), thing).info.experiment_id
    except (UserError, MlflowException) as error:  # a link must not break what it stands in
        _log.warning("There is no link to the MLflow run %s: %s", thing, without_secrets(error))
        return None
    return "/".join([start, "experiments", experiment, "runs", thing])
