"""The order in which a training run sees its images, and the two ways of serving it.

Run position p (the p-th image of the run, 0, 1, 2, ...) is a pure function of (seed, dataset version, p): epoch
e = p // n, and within an epoch the shards in a keyed permutation, cut into windows of G shards, the rows of each window
in a keyed permutation. So a run that continues, on any number of workers, sees what it would have seen, and a dataset
that does not fit in memory is read window by window in exactly the order that memory would give.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.shards import Batch, ImageDataset
from diffusion_core.diffusion.noise import keyed_permutation


@dataclass(frozen=True)
class _Window:
    """G consecutive shards of one epoch's order; offsets `first` to `last` of the epoch fall into it."""

    epoch: int
    index: int
    shards: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class _Block:
    """Rows of some shards, one after the other, in memory."""

    images: np.ndarray  # (N, H, W, C) uint8
    labels: np.ndarray | None  # (N,) int64
    text: list[str | None] | None


class Loader:
    """Serves the rows of one split by run position.

    Args:
        dataset: an opened dataset version.
        split: which of its splits.
        seed: of the order.
        window_shards: G, the number of shards whose rows are mixed with each other. It decides the order.
        memory_budget_bytes: a split of at most so many bytes is kept in memory; a larger one is streamed, with at most
            two windows in memory, the second read ahead in a thread. It does not decide the order.

    Raises:
        UserError: the split is absent, or a shard is damaged.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        split: str = "train",
        seed: int = 0,
        window_shards: int = 4,
        memory_budget_bytes: int = 1 << 30,
    ) -> None:
        if window_shards < 1:
            raise UserError(f"window_shards: {window_shards} is not accepted: it must be at least 1.")
        self.dataset, self.split, self.seed, self.window_shards = dataset, split, seed, window_shards
        self._records = dataset.shards(split)
        self._shard_rows = np.array([record["rows"] for record in self._records], np.int64)
        self._shard_start = np.concatenate([[0], np.cumsum(self._shard_rows)])
        self.num_rows = int(self._shard_start[-1])
        self.in_memory = sum(record["memory_bytes"] for record in self._records) <= memory_budget_bytes
        # Only the last few are asked for again and again.
        self._windows = lru_cache(maxsize=3)(self._plan_epoch)
        self._orders = lru_cache(maxsize=4)(self._order)
        self._lock = threading.Lock()
        self._all = self._load(range(len(self._records))) if self.in_memory else None
        self._stream = None if self.in_memory else _Stream(self._load, self._following)

    def __len__(self) -> int:
        """Rows of the split: the images of one epoch."""
        return self.num_rows

    def take(self, positions: np.ndarray) -> Batch:
        """The rows at the given run positions, in the order asked for. Reading forwards is fast, jumping is right.

        Args:
            positions: (N,) int64, each at least 0; of any epochs.

        Returns:
            images (N, H, W, C) uint8 in memory of their own, labels (N,) int64 or None, text or None; no keys.
        """
        positions = np.asarray(positions, np.int64)
        if positions.ndim != 1 or (len(positions) and positions.min() < 0):
            raise ValueError("positions must be one-dimensional and at least 0")
        images = np.empty((len(positions), *self.dataset.image_shape), np.uint8)
        labels = np.empty(len(positions), np.int64) if self.dataset.class_names else None
        text: list[str | None] | None = [None] * len(positions) if self.dataset.has_text else None
        with self._lock:
            for window, slots, offsets in self._by_window(positions):
                block = self._all or self._stream.get(window)  # type: ignore[union-attr]
                rows = self._orders(window)[offsets - window.first]
                images[slots] = block.images[rows]
                if labels is not None and block.labels is not None:
                    labels[slots] = block.labels[rows]
                if text is not None and block.text is not None:
                    for slot, row in zip(slots, rows, strict=True):
                        text[slot] = block.text[row]
        return Batch(images, labels, text)

    def close(self) -> None:
        """Stop reading ahead and let go of the windows in memory."""
        if self._stream is not None:
            self._stream.close()

    def _by_window(self, positions: np.ndarray) -> Iterator[tuple[_Window, np.ndarray, np.ndarray]]:
        """Each window that is needed, forwards, with the slots of the batch that it fills and their epoch offsets."""
        epochs, offsets = np.divmod(positions, self.num_rows)
        for epoch in np.unique(epochs):
            windows = self._windows(int(epoch))
            which = np.searchsorted([window.first for window in windows], offsets, side="right") - 1
            for index in np.unique(which[epochs == epoch]):
                slots = np.flatnonzero((epochs == epoch) & (which == index))
                yield windows[index], slots, offsets[slots]

    def _plan_epoch(self, epoch: int) -> list[_Window]:
        order = np.asarray(keyed_permutation(self.seed, f"data.shards.{epoch}", len(self._records)))
        windows, first = [], 0
        for index, start in enumerate(range(0, len(order), self.window_shards)):
            shards = tuple(int(shard) for shard in order[start : start + self.window_shards])
            last = first + int(self._shard_rows[list(shards)].sum())
            windows.append(_Window(epoch, index, shards, first, last))
            first = last
        return windows

    def _order(self, window: _Window) -> np.ndarray:
        """(last - first,) int64: the row, in the block that is in memory, of each offset of the window."""
        purpose = f"data.rows.{window.epoch}.{window.index}"
        order = np.asarray(keyed_permutation(self.seed, purpose, window.last - window.first))
        if not self.in_memory:
            return order
        spans = [np.arange(self._shard_start[shard], self._shard_start[shard + 1]) for shard in window.shards]
        return np.concatenate(spans)[order]

    def _following(self, window: _Window) -> _Window:
        windows = self._windows(window.epoch)
        return windows[window.index + 1] if window.index + 1 < len(windows) else self._plan_epoch(window.epoch + 1)[0]

    def _load(self, shards: Sequence[int]) -> _Block:
        """The rows of these shards, one shard after the other; besides them only one shard is in memory at a time."""
        total = int(self._shard_rows[list(shards)].sum())
        images = np.empty((total, *self.dataset.image_shape), np.uint8)
        labels = np.empty(total, np.int64) if self.dataset.class_names else None
        text: list[str | None] | None = [] if self.dataset.has_text else None
        first = 0
        for shard in shards:
            batch = self.dataset.read_shard(self._records[shard], with_keys=False)
            images[first : first + len(batch)] = batch.images
            if labels is not None and batch.labels is not None:
                labels[first : first + len(batch)] = batch.labels
            if text is not None:
                text.extend(batch.text or [None] * len(batch))
            first += len(batch)
        return _Block(images, labels, text)


class _Stream:
    """Windows in memory, at most two: the one in use and the one that is read ahead in a thread."""

    def __init__(self, load: Callable[[Sequence[int]], _Block], following: Callable[[_Window], _Window]) -> None:
        self._load, self._following = load, following
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._held: dict[_Window, Future[_Block]] = {}

    def get(self, window: _Window) -> _Block:
        if window not in self._held:
            self._drop_all_but(None)
            self._start(window)
        block = self._held[window].result()
        ahead = self._following(window)
        if ahead not in self._held:
            self._drop_all_but(window)
            self._start(ahead)
        return block

    def close(self) -> None:
        self._drop_all_but(None)
        self._thread.shutdown(cancel_futures=True)

    def _start(self, window: _Window) -> None:
        self._held[window] = self._thread.submit(self._load, window.shards)

    def _drop_all_but(self, kept: _Window | None) -> None:
        # The one thread loads windows one after the other, so that what is dropped here while it is being read is
        # never in memory beside two others.
        for window in [window for window in self._held if window != kept]:
            self._held.pop(window).cancel()
