"""Files as they were when they were hashed: what is read later must be what the dataset's version was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from diffusion_core.config import UserError
from diffusion_core.data.sources.listing import SourceFile, look
from diffusion_core.store import Directory

_READ_AHEAD = 32  # files read at once from S3


class SourceChanged(UserError):
    """A file is not what it was when it was hashed. `key` names it."""

    def __init__(self, key: str, how: str) -> None:
        super().__init__(key, how)
        self.key, self.how = key, how

    def __str__(self) -> str:
        return f"The source changed while it was sharded: {self.key} {self.how}; run the job again."


@dataclass(frozen=True)
class HashedFile:
    """A file of many images: where it is, how it was listed (before it was hashed), and its SHA-256."""

    place: Directory
    listed: SourceFile
    sha256: str

    @property
    def key(self) -> str:
        return self.listed.key

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Around everything that reads the file: `SourceChanged` at the end, or in place of an error, if it changed.

        A worker reads a part of the file, and hashing all of it for every part would cost many times the reading. So
        size and stamp (the ETag on S3) are compared. They were listed before the file was hashed; if they are the same
        after it was read, then hash and reading saw the same bytes. Only if they are not, its content decides: a copy
        on another node, or one that was merely touched, is as good.
        """
        try:
            yield
        except Exception:
            self._check()
            raise
        self._check()

    def _check(self) -> None:
        now = look(self.place, self.key)
        if now is None:
            raise SourceChanged(self.key, "is gone")
        if now != self.listed and _hash_of_state(self.place, now) != self.sha256:
            raise SourceChanged(self.key, "has other content now")


def read_hashed(place: Directory, key: str, sha256: str) -> bytes:
    """The content of a file. `SourceChanged` if it is not the content that was hashed."""
    try:
        content = place.read(key)
    except FileNotFoundError as error:
        raise SourceChanged(key, "is gone") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SourceChanged(key, "has other content now")
    return content


def read_each(place: Directory, files: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """The content of every (key, SHA-256), in order; some are read at once where most of the time is waiting."""
    if place.is_local:
        yield from (read_hashed(place, *file) for file in files)
        return
    with ThreadPoolExecutor(_READ_AHEAD) as threads:
        for first in range(0, len(files), _READ_AHEAD):
            yield from threads.map(lambda file: read_hashed(place, *file), files[first : first + _READ_AHEAD])


def hash_file(place: Directory, file: SourceFile) -> str:
    """SHA-256 of a file, read in pieces."""
    hasher = hashlib.sha256()
    if place.is_local:
        with open(place.local_path / file.key, "rb") as stream:
            while piece := stream.read(1 << 20):
                hasher.update(piece)
    elif file.size <= 64 << 20:
        hasher.update(place.read(file.key))
    else:
        with place.open(file.key) as stream:
            while piece := stream.read(8 << 20):
                hasher.update(piece)
    return hasher.hexdigest()


@lru_cache(maxsize=1024)
def _hash_of_state(place: Directory, file: SourceFile) -> str:
    """`hash_file`, once for every size and stamp that this process sees."""
    return hash_file(place, file)
