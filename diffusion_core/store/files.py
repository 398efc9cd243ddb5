"""Files of the local disk that appear whole, survive a power cut, and fail with a sentence."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from diffusion_core.config import UserError
from diffusion_core.store.place import StoreFull

TEMPORARY = ".tmp-"  # begins the name of every file that is still being written; such files are never listed
_USER_MISTAKES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted there",
    errno.EOPNOTSUPP: "the file system has no hard links, which commits need",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn the errors of the operating system that the user can mend into one sentence that names the path."""
    try:
        yield
    except OSError as error:
        reason = _USER_MISTAKES.get(error.errno or 0)
        if reason is None:
            raise
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(f"{path} cannot be used: {reason}.") from error


def regular(path: Path) -> Path:
    """The path itself if a regular file is there. Opening anything else (a pipe, say) might block for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    return path


@contextmanager
def new_file(path: Path, content: bytes | Path) -> Iterator[Path]:
    """A complete, synced file with a temporary name beside `path`; removed at the end if it is still there."""
    _make_folder(path.parent)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            _fill(file, content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (an fsync of a file does not cover its name)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(file: BinaryIO, content: bytes | Path) -> None:
    if isinstance(content, Path):
        with open(content, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
    else:
        file.write(content)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder != folder.parent:
        _make_folder(folder.parent)
    try:
        folder.mkdir()
    except (FileExistsError, NotADirectoryError):
        if not folder.is_dir():
            raise UserError(f"{folder} cannot be used: a part of the path is a file, not a folder.") from None
    sync_folder(folder.parent)
