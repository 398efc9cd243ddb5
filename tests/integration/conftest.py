"""One small pipeline, run once, whose results several modules look at."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_core.stages.settings import load_config
from diffusion_core.store import Directory
from tests.tiny_pipeline import SETTINGS


@pytest.fixture(scope="session")
def pipeline_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Directory(tmp_path_factory.mktemp("pipeline") / "store").uri


@pytest.fixture(scope="session")
def first(prefect_server: None, ray_cluster: object, pipeline_store: str) -> Any:
    """The result of the pipeline's first run."""
    from flows.pipeline import diffusion_pipeline

    return diffusion_pipeline(load_config("digits", settings=SETTINGS, shortcuts={"store": pipeline_store}))
