"""Images in, batches out: sources, transforms, dataset versions and the training loader. Importing this is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_core.data.config import DatasetConfig, SourceConfig
    from diffusion_core.data.loader import Loader
    from diffusion_core.data.shards import Batch, ImageDataset, open_dataset, write_dataset

_HOMES = {
    "DatasetConfig": "config",
    "SourceConfig": "config",
    "Batch": "shards",
    "ImageDataset": "shards",
    "open_dataset": "shards",
    "write_dataset": "shards",
    "Loader": "loader",
}

__all__ = ["Batch", "DatasetConfig", "ImageDataset", "Loader", "SourceConfig", "open_dataset", "write_dataset"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
