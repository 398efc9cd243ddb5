"""The store on a local disk, or on any file system with hard links."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffusion_core.config import UserError
from diffusion_core.store.files import TEMPORARY, explained, new_file, regular, sync_folder
from diffusion_core.store.place import Entry, Names

if TYPE_CHECKING:
    from pyarrow import NativeFile


class LocalPlace(NamedTuple):
    """The operations of `Place` on a folder, given by its absolute path."""

    root: Path

    def read(self, key: str) -> bytes:
        path = self.root / key
        with explained(path):
            return regular(path).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        path = self.root / key
        with explained(path), new_file(path, data) as temporary:
            os.replace(temporary, path)
            sync_folder(path.parent)

    def create(self, key: str, content: bytes | Path) -> bool:
        path = self.root / key
        with explained(path):
            if os.path.lexists(path):
                return False
            with new_file(path, content) as temporary:
                try:
                    os.link(temporary, path)  # unlike a rename, it fails if the name is taken
                except FileExistsError:
                    return False
                sync_folder(path.parent)
            return True

    def size(self, key: str) -> int | None:
        path = self.root / key
        with explained(path), suppress(FileNotFoundError):
            if path.is_file():
                return path.stat().st_size
        return None

    def list(self, prefix: str) -> Iterator[Entry]:
        return _walk(str(self.root), "", prefix, ())

    def children(self) -> Names:
        try:
            with os.scandir(self.root) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, key: str) -> NativeFile:
        import pyarrow

        path = self.root / key
        with explained(path):
            return pyarrow.OSFile(str(regular(path)), "rb")

    def download(self, key: str, path: Path) -> None:
        source = self.root / key
        with explained(source), new_file(path, regular(source)) as temporary:
            os.replace(temporary, path)

    def delete(self, key: str) -> None:
        path = self.root / key
        with explained(path):
            path.unlink(missing_ok=True)

    def delete_tree(self) -> None:
        with explained(self.root), suppress(FileNotFoundError):
            shutil.rmtree(self.root)

    def check(self, writable: bool) -> None:
        """Of a folder that is absent, the nearest folder above it counts."""
        nearest = self.root
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            raise UserError(f"The store {self.root} cannot be used: {nearest} is not a folder.")
        if not os.access(nearest, (os.W_OK if writable else os.R_OK) | os.X_OK):
            verb = "written" if writable else "read"
            raise UserError(f"The store {self.root} cannot be {verb}: permission is denied.")


def _walk(folder: str, at: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Regular files below `folder`, whose key is `at`, in the order of their keys, which is S3's order too."""
    try:
        here = os.stat(folder)
        with explained(folder), os.scandir(folder) as scan:
            entries = [(entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in scan]
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a symbolic link to a folder that contains it
        return
    for name, entry in sorted(entries, key=lambda pair: pair[0]):
        key = at + name
        if name.endswith("/"):
            if key.startswith(prefix) or prefix.startswith(key):
                yield from _walk(entry.path, key, prefix, (*above, identity))
        elif key.startswith(prefix) and not name.startswith(TEMPORARY):
            with suppress(FileNotFoundError):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    yield Entry(key, status.st_size, str(status.st_mtime_ns))
