"""SHA-256 of every file of a source, remembered by size and stamp, so that an unchanged source is not read again."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffusion_core.config import digest
from diffusion_core.data.config import DatasetConfig
from diffusion_core.data.sources import Source
from diffusion_core.data.sources.listing import SourceFile
from diffusion_core.store import Directory, layout

_SCHEMA = pa.schema(
    {"uri": pa.string(), "key": pa.string(), "size": pa.int64(), "stamp": pa.string(), "sha256": pa.string()}
)
_THREADS = 8

log = logging.getLogger(__name__)

Hashed = tuple[str, str, str]  # key, SHA-256 or "", problem or ""


class HashCache:
    """Digests of a source's files, in `<store>/datasets/<name>/source-hashes.parquet`. Losing it costs time only."""

    def __init__(self, directory: Directory, uri: str) -> None:
        self._directory, self._uri, self._changed = directory, uri, False
        table = self._table()  # not filtered by pyarrow, which would import pandas where nothing else needs it
        columns = zip(*(table[name].to_pylist() for name in _SCHEMA.names), strict=True)
        self._known = {key: (size, stamp, sha256) for its, key, size, stamp, sha256 in columns if its == uri}

    def get(self, file: SourceFile) -> str | None:
        size, stamp, sha256 = self._known.get(file.key, (None, None, None))
        return sha256 if (size, stamp) == (file.size, file.stamp) else None

    def put(self, file: SourceFile, sha256: str) -> None:
        self._known[file.key], self._changed = (file.size, file.stamp, sha256), True

    def forget(self, key: str) -> None:
        """The file has another content than was remembered, whatever its size and stamp: it must be hashed again."""
        self._known.pop(key, None)
        self._changed = True

    def save(self) -> None:
        """Write what is known of this source in place of what was written of it, if it differs; other sources stay."""
        if not self._changed:
            return
        others = self._table().filter(pc.field("uri") != self._uri)
        rows = [
            {"uri": self._uri, "key": key, "size": size, "stamp": stamp, "sha256": sha256}
            for key, (size, stamp, sha256) in sorted(self._known.items())
        ]
        mine = pa.Table.from_pylist(rows, _SCHEMA)
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables([others, mine]), sink, compression="zstd")
        self._directory.write(layout.SOURCE_HASHES, sink.getvalue())
        self._changed = False

    def _table(self) -> pa.Table:
        try:
            return pq.ParquetFile(pa.BufferReader(self._directory.read(layout.SOURCE_HASHES))).read().cast(_SCHEMA)
        except FileNotFoundError:
            pass
        except (pa.ArrowException, OSError, ValueError) as error:
            log.warning(
                "%s/%s is damaged (%s): the source is hashed again.", self._directory.uri, layout.SOURCE_HASHES, error
            )
        return _SCHEMA.empty_table()


def hash_files(source: Source, files: Sequence[SourceFile]) -> Iterator[Hashed]:
    """Hash files in threads (SHA-256 and reading both let other threads run); one that cannot be read says why."""

    def one(file: SourceFile) -> Hashed:
        try:
            return file.key, source.hash(file), ""
        except OSError as error:
            return file.key, "", f"unreadable: {error.strerror or 'gone since it was listed'}"

    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(one, files)


def digests_of(
    source: Source, cache: HashCache, hash_missing: Callable[[list[SourceFile]], Iterable[Hashed]]
) -> dict[str, str]:
    """SHA-256 of every file that can reach the dataset, by key; what cannot be read is excluded from the source.

    The cache tells what is unchanged by size and stamp, and learns the rest; saving it is left to the caller.

    Args:
        hash_missing: hashes files that the cache does not know, here (`hash_files`) or elsewhere; not asked for none.
    """
    files = {file.key: file for file in source.files if source.needs_hash(file)}
    digests = {key: known for key, file in files.items() if (known := cache.get(file)) is not None}
    problems: dict[str, str] = {}
    if missing := [file for key, file in files.items() if key not in digests]:
        for key, sha256, problem in hash_missing(missing):
            if problem:
                problems[key] = problem
            else:
                digests[key] = sha256
                cache.put(files[key], sha256)
    source.exclude(problems)
    return digests


def dataset_version(source: Source, digests: dict[str, str], config: DatasetConfig) -> str:
    """The version that this source and this configuration make: a digest of keys, contents and identity fields."""
    hasher = hashlib.sha256()
    for line in _lines(source.files, digests):
        hasher.update(line)
    return digest([source.kind.value, source.config, config, hasher.hexdigest()])


def _lines(files: Iterable[SourceFile], digests: dict[str, str]) -> Iterator[bytes]:
    for file in files:
        yield f"{file.key}\0{digests.get(file.key, file.problem or '')}\n".encode()
