"""Local folders and S3 prefixes behind one small interface.

A `Directory` is a place in the store. It holds nothing but its URI, so it can be sent to any process; every process
builds its own client, from its own environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …, or an instance role).

The two ways of writing are different on purpose. `write` replaces whatever is there. `create` writes only if nothing is
there, atomically and durably, and says whether it did: that is how everything in the store is committed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urlsplit

from diffusion_core import traffic
from diffusion_core.config import UserError

if TYPE_CHECKING:
    from pyarrow import NativeFile

    from diffusion_core.storage_s3 import S3Prefix

Names = list[str]  # inside the classes below, `list` is a method

_TEMPORARY = ".tmp-"  # begins the name of every file that is still being written; such files are never listed
_USER_MISTAKES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted there",
    errno.EOPNOTSUPP: "the file system has no hard links, which commits need",
    errno.ENAMETOOLONG: "the name is too long",
}


class StoreFull(UserError):
    """The store takes no more: nothing else that is written there will fare better."""


@dataclass(frozen=True)
class Entry:
    """One file of a listing: its key, its size in bytes, and a stamp that changes when the file does."""

    key: str
    size: int
    stamp: str


class Directory:
    """A folder of the store: `s3://bucket/prefix`, a `file:///…` URI, or a local path.

    Keys are relative paths with `/` between their parts. An absent directory is an empty one: it lists nothing, and the
    first write makes it. Methods that read raise `FileNotFoundError` for an absent key; anything that the user can mend
    (a full disk, refused credentials, a missing bucket) is a `UserError`, and an outage that outlasts the patience a
    `StoreUnavailable`.
    """

    __slots__ = ("uri",)

    def __init__(self, uri: str | Path) -> None:
        self.uri = _canonical(uri)

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.uri.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    @property
    def local_path(self) -> Path:
        """The path of a local directory; `UserError` for a remote one."""
        if not self.is_local:
            raise UserError(f"{self.uri} is not a local folder, and a local folder is needed here.")
        return Path(self.uri)

    def __truediv__(self, relative: str) -> Directory:
        return Directory(f"{self.uri.rstrip('/')}/{_checked_key(relative)}")

    def __repr__(self) -> str:
        return f"Directory({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Directory) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __reduce__(self) -> tuple[type[Directory], tuple[str]]:
        return Directory, (self.uri,)

    def read(self, key: str) -> bytes:
        """The whole content of a file."""
        if not self.is_local:
            return self._s3.read(_checked_key(key))
        path = self._path(key)
        with _explained(path):
            return _regular(path).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        """Put a file there in place of whatever was there. Readers see the old content or the new, never a part."""
        traffic.wrote(len(data))
        if not self.is_local:
            self._s3.write(_checked_key(key), data)
            return
        path = self._path(key)
        with _explained(path), _new_file(path, data) as temporary:
            os.replace(temporary, path)
            _sync_folder(path.parent)

    def create(self, key: str, data: bytes) -> bool:
        """Put a file there if none is there. True if it did, False if there was one, which is then left as it is.

        Of any number of processes that create the same key at once exactly one gets True, and no reader ever sees a
        part of the file. When it returns, the file survives a power cut.
        """
        traffic.wrote(len(data))
        if not self.is_local:
            return self._s3.create(_checked_key(key), data)
        return _create_locally(self._path(key), data)

    def create_file(self, key: str, path: Path) -> bool:
        """Like `create`, with the content of a local file of any size."""
        traffic.wrote(path.stat().st_size)
        if not self.is_local:
            return self._s3.create_file(_checked_key(key), path)
        return _create_locally(self._path(key), path)

    def read_json(self, key: str) -> Any:
        return json.loads(self.read(key))

    def write_json(self, key: str, obj: Any) -> None:
        self.write(key, _json_bytes(obj))

    def create_json(self, key: str, obj: Any) -> bool:
        return self.create(key, _json_bytes(obj))

    def exists(self, key: str) -> bool:
        """True if there is a file of this key. (A directory is not a file.)"""
        if not self.is_local:
            return self._s3.size(_checked_key(key)) is not None
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        """Bytes of a file."""
        if not self.is_local:
            size = self._s3.size(_checked_key(key))
            if size is None:
                raise FileNotFoundError(f"{self.uri}/{key}")
            return size
        path = self._path(key)
        with _explained(path):
            return _regular(path).stat().st_size

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All files below this directory whose key begins with `prefix`, sorted by key, one at a time."""
        if not self.is_local:
            return self._s3.list(prefix)
        return _walk(Path(self.uri), prefix)

    def children(self) -> Names:
        """Names of the directories directly below this one, sorted."""
        if not self.is_local:
            return self._s3.children()
        try:
            with os.scandir(self.uri) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, key: str) -> NativeFile:
        """A file opened for random access, as pyarrow's Parquet reader wants it."""
        if not self.is_local:
            return self._s3.open(_checked_key(key))
        import pyarrow

        path = self._path(key)
        with _explained(path):
            return pyarrow.OSFile(str(_regular(path)), "rb")

    def download(self, key: str, path: Path) -> None:
        """Copy a file of the store to a local path; the path appears when it is complete."""
        if self.is_local:
            source = self._path(key)
            with _explained(source), _new_file(path, _regular(source)) as temporary:
                os.replace(temporary, path)
            return
        with _explained(path), _new_file(path, b"") as temporary:
            self._s3.download(_checked_key(key), temporary)
            os.replace(temporary, path)

    def delete(self, key: str) -> None:
        """Remove a file; no error if there is none."""
        if not self.is_local:
            self._s3.delete(_checked_key(key))
            return
        with _explained(self._path(key)):
            self._path(key).unlink(missing_ok=True)

    def delete_tree(self) -> None:
        """Remove this directory and everything below it; no error if there is none."""
        if not self.is_local:
            self._s3.delete_tree()
            return
        with _explained(self.uri), suppress(FileNotFoundError):
            shutil.rmtree(self.uri)

    def _path(self, key: str) -> Path:
        return Path(self.uri, _checked_key(key))

    @property
    def _s3(self) -> S3Prefix:
        from diffusion_core.storage_s3 import S3Prefix

        return S3Prefix.of(self.uri)


def check_reachable(uri: str | Path, writable: bool = True) -> None:
    """Make sure, in less than three seconds, that a store can be used; `UserError` says what is in the way.

    Of a local folder that is absent, the nearest folder above it counts. With `writable=False` reading is enough.
    """
    place = Directory(uri)
    if not place.is_local:
        from diffusion_core.storage_s3_check import check_reachable_s3

        check_reachable_s3(place.uri, writable)
        return
    nearest = Path(place.uri)
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"The store {place.uri} cannot be used: {nearest} is not a folder.")
    if not os.access(nearest, (os.W_OK if writable else os.R_OK) | os.X_OK):
        raise UserError(f"The store {place.uri} cannot be {'written' if writable else 'read'}: permission is denied.")


def _canonical(uri: str | Path) -> str:
    """`s3://bucket/prefix` or an absolute local path, without a slash at the end."""
    text = str(uri)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a place: give a local path, file:///path, or s3://bucket/prefix.")
    scheme, separator, _ = text.partition("://")
    if isinstance(uri, Path) or not separator:
        return os.path.abspath(os.path.expanduser(text))
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UserError(f"{text!r} is not a local file URI: it must begin with file:/// (three slashes).")
        return os.path.abspath(unquote(parts.path))
    if scheme == "s3":
        return _canonical_s3(text)
    raise UserError(
        f"{text!r} has the scheme {scheme!r}; accepted are a local path, file:///path, and s3://bucket/prefix."
    )


def _canonical_s3(text: str) -> str:
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    if "?" in text or "@" in bucket:
        raise UserError(
            f"{text.partition('?')[0].rpartition('@')[2]!r} must not carry an endpoint or credentials: "
            "set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment."
        )
    if not 3 <= len(bucket) <= 63 or not set(bucket) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_"):
        raise UserError(
            f"{text!r} has no valid bucket name: 3 to 63 small letters, digits, dots and hyphens after s3://."
        )
    prefix = prefix.rstrip("/")
    return f"s3://{bucket}/{_checked_key(prefix)}" if prefix else f"s3://{bucket}"


def _checked_key(key: str) -> str:
    """The key itself; a key that is empty, absolute or climbs out of its directory is refused."""
    if not key or any(part in ("", ".", "..") for part in key.rstrip("/").split("/")):
        raise UserError(f"{key!r} is not a relative path inside the store.")
    return key.rstrip("/")


def _json_bytes(obj: Any) -> bytes:
    return (json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextmanager
def _explained(path: Path | str) -> Iterator[None]:
    """Turn the errors of the operating system that the user can mend into one sentence that names the path."""
    try:
        yield
    except OSError as error:
        reason = _USER_MISTAKES.get(error.errno or 0)
        if reason is None:
            raise
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(f"{path} cannot be used: {reason}.") from error


def _regular(path: Path) -> Path:
    """The path itself if a regular file is there. Opening anything else (a pipe, say) might block for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    return path


def _create_locally(path: Path, content: bytes | Path) -> bool:
    with _explained(path):
        if os.path.lexists(path):
            return False
        with _new_file(path, content) as temporary:
            try:
                os.link(temporary, path)  # unlike a rename, it fails if the name is taken
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True


@contextmanager
def _new_file(path: Path, content: bytes | Path) -> Iterator[Path]:
    """A complete, synced file with a temporary name beside `path`; removed at the end if it is still there."""
    _make_folder(path.parent)
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            _fill(file, content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


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
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (an fsync of a file does not cover its name)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(root: Path, prefix: str) -> Iterator[Entry]:
    """Regular files below `root` in the order of their keys, which is S3's order too."""
    yield from _walk_folder(str(root), "", prefix, ())


def _walk_folder(folder: str, at: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    try:
        here = os.stat(folder)
        with _explained(folder), os.scandir(folder) as scan:
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
                yield from _walk_folder(entry.path, key, prefix, (*above, identity))
        elif key.startswith(prefix) and not name.startswith(_TEMPORARY):
            with suppress(FileNotFoundError):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    yield Entry(key, status.st_size, str(status.st_mtime_ns))
