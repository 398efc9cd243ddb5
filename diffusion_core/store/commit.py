"""Files, and then a record of them: how everything that consists of several files is committed.

The record is written last, and only if absent. A folder without one was interrupted, and whoever wrote it first
decides what the folder holds. A record has a schema version, and every older one is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_core.config import UserError
from diffusion_core.store.directory import Directory


class NoRecord(UserError):
    """There is no record, or what is there is none: the folder holds nothing that was committed."""


class Damaged(Exception):
    """A file is not what its record says. `key` names it, and `problem` ends the sentence that begins with it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key, self.problem = key, problem


@dataclass(frozen=True)
class RecordKind:
    """A kind of record.

    Attributes:
        key: its name in the folder that it commits.
        what: what such a folder is called, as "a dataset version".
        schema_version: of the records that are written; the newest that is understood.
    """

    key: str
    what: str
    schema_version: int

    def commit(self, place: Directory, files: Mapping[str, bytes], fields: Mapping[str, Any]) -> None:
        """Write files and then their record, with these fields; nothing that a record names already is changed.

        Files are created if absent. Those of an interrupted attempt that have other bytes are replaced.
        """
        for key, data in files.items():
            if not place.create(key, data) and place.read(key) != data and not place.exists(self.key):
                place.write(key, data)
        place.create_json(self.key, {"schema_version": self.schema_version, **fields})

    def read(self, place: Directory) -> dict[str, Any]:
        """The record of a folder.

        Raises:
            NoRecord: there is none, or it is no JSON object.
            UserError: it was written by a newer version.
        """
        try:
            record = place.read_json(self.key)
        except FileNotFoundError:
            raise NoRecord(f"{place.uri} is not {self.what}: there is no {self.key} in it.") from None
        except ValueError as error:
            raise NoRecord(f"{place.uri} is not {self.what}: its {self.key} cannot be read ({error}).") from error
        if not isinstance(record, dict):
            raise NoRecord(f"{place.uri} is not {self.what}: its {self.key} cannot be read.")
        version = record.get("schema_version", 1)
        if not isinstance(version, int) or version > self.schema_version:
            raise UserError(
                f"{place.uri} was written by a newer version: its {self.key} has schema version {version}, and "
                f"this one reads up to {self.schema_version}."
            )
        return record


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def described(data: bytes) -> dict[str, Any]:
    """What a record says of a file: its `bytes` and its `sha256`."""
    return {"bytes": len(data), "sha256": sha256(data)}


def create_or_read(place: Directory, key: str, data: bytes) -> bytes:
    """Create a file if it is absent; what is stored then, which is another writer's who was faster."""
    return data if place.create(key, data) else place.read(key)


def read_recorded(place: Directory, key: str, recorded: str) -> bytes:
    """The content of a file, if it has the SHA-256 that its record says; else `Damaged`."""
    try:
        data = place.read(key)
    except FileNotFoundError:
        raise Damaged(key, "is missing") from None
    if sha256(data) != recorded:
        raise Damaged(key, "differs from what its record says")
    return data
