"""What takes long to start and serves several files: the first run of a small pipeline, and a stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.stages.settings import load_config
from diffusion_core.store import Directory
from tests.local_stack import LocalStack
from tests.tiny_pipeline import SETTINGS


@pytest.fixture(scope="session")
def pipeline_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Directory(tmp_path_factory.mktemp("pipeline") / "store").uri


@pytest.fixture(scope="session")
def first_run(prefect_server: None, ray_cluster: object, pipeline_store: str) -> tuple[Any, dict[str, int]]:
    from flows.pipeline import diffusion_pipeline

    result = diffusion_pipeline(load_config("digits", settings=SETTINGS, shortcuts={"store": pipeline_store}))
    sizes: dict[str, int] = {}
    for path in filter(Path.is_file, Path(pipeline_store).rglob("*")):
        folder = path.relative_to(pipeline_store).parts[0]
        sizes[folder] = sizes.get(folder, 0) + path.stat().st_size
    return result, sizes


@pytest.fixture(scope="session")
def first(first_run: tuple[Any, dict[str, int]]) -> Any:
    """The result of the pipeline's first run."""
    return first_run[0]


@pytest.fixture(scope="session")
def first_bytes(first_run: tuple[Any, dict[str, int]]) -> dict[str, int]:
    """What the first run left in the store, in bytes by folder; other tests add to it later."""
    return first_run[1]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A stack with a Ray head; the last test that uses it takes it down."""
    stack = LocalStack(Directory(tmp_path_factory.mktemp("stack") / "store").uri, "--ray")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
