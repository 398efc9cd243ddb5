"""Which job this process is, and what it is about: labels of its metrics, fields of its log lines, and `ids.json`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from diffusion_core.config import UserError
from diffusion_core.store import Directory, layout
from diffusion_core.store.patience import StoreUnavailable, patience

IDS = layout.IDS
_PATIENCE_S = 5.0

logger = logging.getLogger(__name__)


@dataclass
class Context:
    """The job of this process. `place` is the directory of its files, None in a process that is no job."""

    stage: str = ""
    job_id: str = ""
    place: Directory | None = None
    ids: dict[str, str] = field(default_factory=dict)


_current = Context()


def current() -> Context:
    return _current


def begin(stage: str, place: Directory) -> None:
    """This process is the job whose files are in `place`, a directory with the name of the job."""
    global _current
    _current = Context(stage, place.uri.rpartition("/")[2], place)


def about(**ids: str | None) -> None:
    """The work turned out to be about these: `run_id`, `dataset`, `set_id`, `mlflow_run_id`, …

    They are in every later log line, and in `ids.json` for whoever has to clear up after this job.
    """
    known = {**_current.ids, **{name: value for name, value in ids.items() if value}}
    if known == _current.ids:
        return
    _current.ids = known
    if _current.place is not None:
        try:
            with patience(_PATIENCE_S):
                _current.place.write_json(IDS, known)
        except (UserError, OSError, StoreUnavailable) as error:  # only for others: it must not break the job
            logger.warning("What the job is about is not in the store: %s", error)
