from __future__ import annotations

import pytest

from tests.tiny_bundle import tiny_bundle


@pytest.fixture(scope="session")
def bundle_uri(tmp_path_factory):
    """A small class-conditional bundle with random weights, images of 8x8x1."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def guide_uri(tmp_path_factory):
    """Another one of the same process, images and classes."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "guide", seed=1)


@pytest.fixture(scope="session")
def unconditional_uri(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "unconditional", class_names=(), image_shape=(4, 8, 3))
