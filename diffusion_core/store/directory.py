"""A place in the store, as everybody but the two kinds of store sees it.

A `Directory` holds nothing but its URI, so it can be sent to any process; every process builds its own client, from its
own environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …, or an instance role).

The two ways of writing are different on purpose. `write` replaces whatever is there. `create` writes only if nothing is
there, atomically and durably, and says whether it did: that is how everything in the store is committed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from diffusion_core.config import UserError
from diffusion_core.store.local import LocalPlace
from diffusion_core.store.place import Entry, Names, Place

if TYPE_CHECKING:
    from pyarrow import NativeFile


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
        return self._place.read(_checked_key(key))

    def write(self, key: str, data: bytes) -> None:
        """Put a file there in place of whatever was there. Readers see the old content or the new, never a part."""
        self._place.write(_checked_key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Put a file there if none is there. True if it did, False if there was one, which is then left as it is.

        Of any number of processes that create the same key at once exactly one gets True, and no reader ever sees a
        part of the file. When it returns, the file survives a power cut.
        """
        return self._place.create(_checked_key(key), data)

    def create_file(self, key: str, path: Path) -> bool:
        """Like `create`, with the content of a local file of any size."""
        return self._place.create(_checked_key(key), path)

    def read_json(self, key: str) -> Any:
        return json.loads(self.read(key))

    def write_json(self, key: str, obj: Any) -> None:
        self.write(key, _json_bytes(obj))

    def create_json(self, key: str, obj: Any) -> bool:
        return self.create(key, _json_bytes(obj))

    def exists(self, key: str) -> bool:
        """True if there is a file of this key. (A directory is not a file.)"""
        return self._place.size(_checked_key(key)) is not None

    def size(self, key: str) -> int:
        """Bytes of a file."""
        size = self._place.size(_checked_key(key))
        if size is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        return size

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All files below this directory whose key begins with `prefix`, sorted by key, one at a time."""
        return self._place.list(prefix)

    def children(self) -> Names:
        """Names of the directories directly below this one, sorted."""
        return self._place.children()

    def open(self, key: str) -> NativeFile:
        """A file opened for random access, as pyarrow's Parquet reader wants it."""
        return self._place.open(_checked_key(key))

    def download(self, key: str, path: Path) -> None:
        """Copy a file of the store to a local path; the path appears when it is complete."""
        self._place.download(_checked_key(key), path)

    def delete(self, key: str) -> None:
        """Remove a file; no error if there is none."""
        self._place.delete(_checked_key(key))

    def delete_tree(self) -> None:
        """Remove this directory and everything below it; no error if there is none."""
        self._place.delete_tree()

    @property
    def _place(self) -> Place:
        if self.is_local:
            return LocalPlace(Path(self.uri))
        from diffusion_core.store.s3 import S3Place  # loads botocore, which a local store does without

        return S3Place.of(self.uri)


def check_reachable(uri: str | Path, writable: bool = True) -> None:
    """Make sure, in less than three seconds, that a store can be used; `UserError` says what is in the way.

    Of a local folder that is absent, the nearest folder above it counts. With `writable=False` reading is enough.
    """
    Directory(uri)._place.check(writable)


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
