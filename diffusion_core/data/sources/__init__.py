"""Where images come from: a folder, Parquet, IDX, .npz, or the bundled digits; in this machine or behind s3://."""

from __future__ import annotations

from diffusion_core.config import UserError
from diffusion_core.data.config import SourceConfig, SourceKind
from diffusion_core.data.sources.base import Item, Reader, Scan, Source
from diffusion_core.data.sources.digits import DigitsSource
from diffusion_core.data.sources.folder import FolderSource
from diffusion_core.data.sources.idx import IdxSource, is_idx
from diffusion_core.data.sources.listing import IMAGE_SUFFIXES, SourceFile, list_files, suffix
from diffusion_core.data.sources.npz import NpzSource
from diffusion_core.data.sources.parquet import ParquetSource

__all__ = ["Item", "Reader", "Scan", "Source", "open_source"]

_SOURCES: dict[SourceKind, type[Source]] = {
    SourceKind.FOLDER: FolderSource,
    SourceKind.PARQUET: ParquetSource,
    SourceKind.IDX: IdxSource,
    SourceKind.NPZ: NpzSource,
}


def open_source(config: SourceConfig, store: str | None = None) -> Source:
    """List a source, but for the store if that lies inside it. Decodes no image.

    Raises:
        UserError: nothing is there, or nothing that can be a source of images.
    """
    if config.kind is SourceKind.DIGITS:
        return DigitsSource(config)
    assert config.uri is not None  # SourceConfig makes sure of it
    place, files = list_files(config.uri, store)
    if not files:
        raise UserError(f"source.uri: {config.uri} is empty: there is no file in it.")
    kind = _kind_of(config, files) if config.kind is SourceKind.AUTO else config.kind
    source = _SOURCES[kind](config, place, files)
    source.complete()
    return source


def _kind_of(config: SourceConfig, files: list[SourceFile]) -> SourceKind:
    suffixes = {suffix(file.key) for file in files}
    if suffixes & IMAGE_SUFFIXES:
        return SourceKind.FOLDER
    if ".parquet" in suffixes:
        return SourceKind.PARQUET
    if any(is_idx(file.key) for file in files):
        return SourceKind.IDX
    if ".npz" in suffixes:
        return SourceKind.NPZ
    found = ", ".join(sorted(suffixes - {""})[:5]) or "files without a suffix"
    raise UserError(
        f"source.uri: {config.uri} holds no images: image files, Parquet, IDX (-ubyte, -ubyte.gz) or .npz are accepted,"
        f" and there is {found}."
    )
