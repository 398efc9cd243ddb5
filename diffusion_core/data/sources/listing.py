"""The files of a source: listed once, sorted, with what is wrong with a name or a link said at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusion_core.config import UserError
from diffusion_core.store import Directory

_FORMATS = "png jpg jpeg jpe jfif webp bmp dib gif tif tiff ppm pgm pbm pnm tga jp2 avif ico"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _FORMATS.split(" "))
_IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: its path below the source, its bytes, a stamp that changes with it, and what is wrong with it.

    The stamp is the ETag on S3. Of a local file it is the time of its last modification and that of its last change of
    state, because the former can be set back, as `cp -p` and `rsync` do.
    """

    key: str
    size: int = 0
    stamp: str = ""
    problem: str | None = None


def suffix(key: str) -> str:
    """The lower-case suffix of a key, `.png`; empty if there is none."""
    return os.path.splitext(key)[1].lower()


def list_files(uri: str) -> tuple[Directory, list[SourceFile]]:
    """The directory of a source and its files sorted by key; for the URI of one file, its directory and that file.

    Hidden files and those that file managers leave behind are passed over.

    Raises:
        UserError: there is nothing at the URI, or it cannot be listed.
    """
    place = Directory(uri)
    if not place.is_local:
        return _list_remote(place)
    path = Path(place.uri)
    if path.is_file():
        status = path.stat()
        return Directory(path.parent), [_local_file(path.name, status)]
    if not path.is_dir():
        raise UserError(f"source.uri: {uri} does not exist: give a folder or a file of images.")
    return place, sorted(_walk(path, "", ()), key=lambda file: file.key)


def look(place: Directory, key: str) -> SourceFile | None:
    """A file as it is now; None if it is not there, or cannot be reached."""
    if not place.is_local:
        # As at the first time a listing is asked, because some services give another ETag with the object itself.
        entry = next(place.list(key), None)
        return SourceFile(key, entry.size, entry.stamp) if entry and entry.key == key else None
    try:
        status = os.stat(place.local_path / key)
    except OSError:
        return None
    return _local_file(key, status) if stat.S_ISREG(status.st_mode) else None


def _local_file(key: str, status: os.stat_result) -> SourceFile:
    return SourceFile(key, status.st_size, f"{status.st_mtime_ns} {status.st_ctime_ns}")


def _list_remote(place: Directory) -> tuple[Directory, list[SourceFile]]:
    files = [
        SourceFile(entry.key, entry.size, entry.stamp, _bad_key(entry.key))
        for entry in place.list()
        if not entry.key.endswith("/") and not any(map(_is_ignored, entry.key.split("/")))
    ]
    if files or "/" not in place.uri.removeprefix("s3://"):
        return place, files
    parent = Directory(place.uri.rpartition("/")[0])
    return parent, [
        SourceFile(entry.key, entry.size, entry.stamp) for entry in parent.list(place.name) if entry.key == place.name
    ]


def _walk(folder: Path, at: str, above: tuple[tuple[int, int], ...]) -> Iterator[SourceFile]:
    """The files below a local folder. Links are followed; one that leads back up is an entry with a problem."""
    here = os.stat(folder)
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        yield SourceFile(_shown(at.rstrip("/")), problem="symbolic link loop: it leads to a folder that contains it")
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        if not at:
            raise UserError(f"source.uri: {folder} cannot be listed: {error.strerror}.") from error
        yield SourceFile(_shown(at.rstrip("/")), problem=f"unreadable folder: {error.strerror}")
        return
    for entry in entries:
        if not _is_ignored(entry.name):
            yield from _entry(entry, at, (*above, identity))


def _entry(entry: os.DirEntry[str], at: str, above: tuple[tuple[int, int], ...]) -> Iterator[SourceFile]:
    key = at + entry.name
    try:
        status = entry.stat()
    except OSError as error:
        what = "dangling symbolic link" if entry.is_symlink() else "unreadable"
        yield SourceFile(_shown(key), problem=f"{what}: {error.strerror}")
        return
    if stat.S_ISDIR(status.st_mode):
        yield from _walk(Path(entry.path), key + "/", above)
    elif not stat.S_ISREG(status.st_mode):
        yield SourceFile(_shown(key), problem="not a regular file")
    elif _shown(key) != key:
        yield SourceFile(_shown(key), status.st_size, problem="its name is not valid UTF-8")
    else:
        yield _local_file(key, status)


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in _IGNORED


def _bad_key(key: str) -> str | None:
    return "its name has an empty or relative part" if {"", ".", ".."} & set(key.split("/")) else None


def _shown(key: str) -> str:
    """The key with bytes that are not UTF-8 written as \\xNN."""
    return os.fsencode(key).decode("utf-8", "backslashreplace")
