"""Whoever follows a job tells of it, and never ends it because nobody can be told."""

from __future__ import annotations

import logging

import httpx
import pytest

from diffusion_core.progress import ProgressEvent
from flows import follow
from flows.display import current_display


def test_a_server_that_is_away_does_not_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "get_run_logger", lambda: logging.getLogger("run"))
    told = []

    def tell(percent: float, **_: object) -> None:
        told.append(percent)
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(follow, "create_progress_artifact", tell)
    follower = follow._Follower("train", current_display())
    follower.progress(ProgressEvent(stage="train", done=1, total=4, unit="images"))
    assert told == [25.0]
