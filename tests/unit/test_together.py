"""The division of the suite among processes names files that exist."""

from __future__ import annotations

from pathlib import Path

from tests.together import TOGETHER


def test_files_that_share_services_exist() -> None:
    root = Path(__file__).parent.parent.parent
    assert [file for file in TOGETHER if not (root / file).is_file()] == []
