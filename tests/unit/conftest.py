"""What holds for every unit test: it shares its process with others, and leaves nothing behind that goes on there."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_beats_on() -> Iterator[None]:
    """A lease that a test does not end writes its beats into what later tests count."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("lease-")]
    assert not left, f"leases of this test are still held: {left}"
