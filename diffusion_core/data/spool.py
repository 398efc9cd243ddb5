"""What is read once, for sources without random access: their items, still encoded, in the order of positions.

Every shard takes its rows from all over the source. Where reading all of it for each shard is too much, each chunk of
the source is read once and written to `work/`, sorted, so that a shard reads its own part of every chunk.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_core.data.sources import Item, Reader
from diffusion_core.data.transforms import RejectedItem
from diffusion_core.store import Directory, layout

SPOOL_ABOVE_BYTES = 4 << 30


def spool_chunks(reader: Reader, source_bytes: int, shards: int) -> list[range]:
    """Ranges of items to spool first; empty if every shard had better read the source itself."""
    if reader.random_access or source_bytes * shards <= SPOOL_ABOVE_BYTES:
        return []
    return reader.chunks()


def spool_chunk(directory: Directory, reader: Reader, positions: np.ndarray, number: int, chunk: range) -> None:
    """Write the items of one chunk, still encoded, sorted by position. `positions`: (N,) of every item, -1 for none."""
    key = layout.spooled_chunk(number)
    if directory.exists(key):
        return
    items = np.arange(chunk.start, chunk.stop)
    items = items[positions[items] >= 0]
    found = sorted(((int(positions[items[item.slot]]), item) for item in reader.read(items)), key=lambda row: row[0])
    arrays = [item.content if isinstance(item.content, np.ndarray) else None for _, item in found]
    table = pa.table(
        {
            "position": pa.array([position for position, _ in found], pa.int64()),
            "key": pa.array([item.key for _, item in found], pa.large_string()),
            "text": pa.array([item.text for _, item in found], pa.large_string()),
            "content": pa.array([_payload(item) for _, item in found], pa.large_binary()),
            "shape": pa.array([None if array is None else array.shape for array in arrays], pa.list_(pa.int32())),
            "problem": pa.array([str(c) if isinstance(c := item.content, RejectedItem) else None for _, item in found]),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=max(16, len(found) // 64))
    directory.create(key, sink.getvalue())


def positions_of_items(order: np.ndarray) -> np.ndarray:
    """The inverse of a plan's order: (N,) int64 position of every item number, -1 for items that are not planned."""
    positions = np.full(int(order.max()) + 1, -1, np.int64)
    positions[order] = np.arange(len(order))
    return positions


def read_spool(directory: Directory, chunks: int, positions: np.ndarray, start: int) -> Iterator[Item]:
    """The items at these positions (sorted); slots count from `start`."""
    if not len(positions):
        return
    for number in range(chunks):
        with directory.open(layout.spooled_chunk(number)) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.num_row_groups):
                statistics = file.metadata.row_group(group).column(0).statistics
                if statistics.min <= positions[-1] and statistics.max >= positions[0]:
                    yield from _spooled_items(file.read_row_group(group), positions, start)


def _spooled_items(table: pa.Table, positions: np.ndarray, start: int) -> Iterator[Item]:
    for row in table.filter(np.isin(table["position"], positions)).to_pylist():
        content: bytes | np.ndarray | RejectedItem = row["content"]
        if row["problem"] is not None:
            content = RejectedItem(row["problem"])
        elif row["shape"] is not None:
            content = np.frombuffer(row["content"], np.uint8).reshape(row["shape"])
        yield Item(row["position"] - start, row["key"], content, row["text"])


def _payload(item: Item) -> bytes | None:
    if isinstance(item.content, RejectedItem):
        return None
    return item.content.tobytes() if isinstance(item.content, np.ndarray) else item.content
