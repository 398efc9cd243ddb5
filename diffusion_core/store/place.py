"""What a kind of store must do: `LocalPlace` and `S3Place` do it, and `Directory` is what everybody else sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffusion_core.config import UserError

if TYPE_CHECKING:
    from pyarrow import NativeFile

Names = list[str]  # in a class with a method `list`, the word means the method


class StoreFull(UserError):
    """The store takes no more: nothing else that is written there will fare better."""


@dataclass(frozen=True)
class Entry:
    """One file of a listing: its key, its size in bytes, and a stamp that changes when the file does."""

    key: str
    size: int
    stamp: str


class Place(Protocol):
    """One folder, or one prefix of a bucket. The keys that it is given are relative paths that stay inside it.

    What reads raises `FileNotFoundError` for an absent key. An absent place is an empty one.
    """

    def read(self, key: str) -> bytes:
        """The whole content of a file."""

    def write(self, key: str, data: bytes) -> None:
        """Put a file there in place of whatever was there, at once for every reader."""

    def create(self, key: str, content: bytes | Path) -> bool:
        """Put a file there, at once and durably, if none is there; whether it did. A path stands for its content."""

    def size(self, key: str) -> int | None:
        """Bytes of a file, or None if there is none."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All files whose key begins with `prefix`, sorted by key."""

    def children(self) -> Names:
        """Names of the directories directly below, sorted."""

    def open(self, key: str) -> NativeFile:
        """A file opened for random access."""

    def download(self, key: str, path: Path) -> None:
        """Copy a file to a local path, which appears when it is complete."""

    def delete(self, key: str) -> None:
        """Remove a file; no error if there is none."""

    def delete_tree(self) -> None:
        """Remove the place and everything below it; no error if there is none."""

    def check(self, writable: bool) -> None:
        """Make sure, in less than three seconds, that it can be read, or written; `UserError` if not."""
