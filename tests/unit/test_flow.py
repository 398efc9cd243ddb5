"""What the log of a flow run says of an error: its traceback once; of a user's mistake nothing but its sentence."""

from __future__ import annotations

import logging

import pytest

from diffusion_core.config import UserError
from flows import flow


@pytest.mark.parametrize(("error", "tracebacks"), [(KeyError("count"), 1), (UserError("count: none."), 0)])
def test_a_traceback_is_shown_once_and_what_else_is_said_stays(
    caplog: pytest.LogCaptureFixture, error: Exception, tracebacks: int
) -> None:
    """By a logger that has the filters of Prefect's, and sends nothing to a server."""
    logger = logging.Logger(flow.__name__)
    logger.filters = logging.getLogger("prefect.flow_runs").filters
    logger.addHandler(caplog.handler)
    logger.error("outside of any", exc_info=True)
    try:
        raise error
    except Exception:
        logger.error("Encountered exception during execution: %r", error, exc_info=True)
        logger.error("Task run failed with %r", error, exc_info=True)
        logger.error("A hook met an error", exc_info=True)
    told = [f"Encountered exception during execution: {error!r}", "A hook met an error"] if tracebacks else []
    assert caplog.messages == ["outside of any", *told]
    assert caplog.text.count("Traceback") == tracebacks
