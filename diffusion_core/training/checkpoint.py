"""Checkpoints in the store: the only truth about how far a run is.

`<images_seen>/` holds the tensors as safetensors files, each named after its content, and `record.json`, written last
and only if absent: it is the commit, and lists the digest of each file. A directory without a record was interrupted;
one whose files do not have the digests of the record is damaged. Neither is ever loaded.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion_core.store import Directory, layout

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """`parts` are named groups of tensors (network, ema, optimizer); `meta` is whatever JSON was saved with them."""

    images_seen: int
    parts: dict[str, Tensors]
    meta: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint whose record or files are not what was written."""


def save_checkpoint(place: Directory, checkpoint: Checkpoint) -> None:
    """Commit a checkpoint below `place`. One that is there already and sound is left; a damaged one is replaced."""
    here = place / str(checkpoint.images_seen)
    if here.exists(layout.CHECKPOINT):
        try:
            read_checkpoint(place, checkpoint.images_seen)
            return
        except DamagedError as error:
            logger.warning("%s It is replaced.", error)
            delete_checkpoint(here)
    files = {}
    for name, tensors in checkpoint.parts.items():
        data = safetensors.torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        sha256 = hashlib.sha256(data).hexdigest()
        key = layout.tensors(name, sha256)
        here.create(key, data)
        files[name] = {"file": key, "bytes": len(data), "sha256": sha256}
    record = {
        "schema_version": SCHEMA_VERSION,
        "images_seen": checkpoint.images_seen,
        "files": files,
        "meta": checkpoint.meta,
    }
    here.create_json(layout.CHECKPOINT, record)


def load_newest(place: Directory) -> Checkpoint | None:
    """The newest checkpoint whose files have the digests of its record; None if there is none.

    Damaged ones are passed over with a warning, interrupted ones silently.
    """
    for images_seen in sorted(checkpoints(place), reverse=True):
        try:
            return read_checkpoint(place, images_seen)
        except DamagedError as error:
            logger.warning("%s The one before it is used.", error)
    return None


def checkpoints(place: Directory) -> list[int]:
    """images_seen of every committed checkpoint, ascending; whether they are sound is not looked at."""
    numbers = sorted(int(name) for name in place.children() if name.isdigit())
    return [number for number in numbers if place.exists(f"{number}/{layout.CHECKPOINT}")]


def prune_checkpoints(place: Directory, keep: int, newest: int) -> None:
    """Delete all but the `keep` newest committed checkpoints up to `newest`, the one saved last.

    Those beyond it are damaged remains of an attempt that came further; the run replaces them when it gets there.
    """
    old = [number for number in checkpoints(place) if number <= newest][:-keep]
    if not old:
        return
    for name in place.children():
        if name.isdigit() and int(name) <= old[-1]:
            delete_checkpoint(place / name)


def delete_checkpoint(here: Directory) -> None:
    """Delete a checkpoint, given its own directory."""
    here.delete(layout.CHECKPOINT)  # first, so that a deletion that is cut short never looks like damage
    here.delete_tree()


def read_checkpoint(place: Directory, images_seen: int) -> Checkpoint:
    """One checkpoint; `DamagedError` if its files are not those that its record names, or there is none."""
    here = place / str(images_seen)
    try:
        record = here.read_json(layout.CHECKPOINT)
        parts = {name: _tensors(here, file) for name, file in record["files"].items()}
        return Checkpoint(int(record["images_seen"]), parts, record["meta"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedError(f"The checkpoint {here.uri} is damaged ({error}).") from error


def _tensors(here: Directory, file: dict[str, Any]) -> Tensors:
    data = here.read(file["file"])
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise ValueError(f"{file['file']} has other bytes than {layout.CHECKPOINT} says")
    return safetensors.torch.load(data)
