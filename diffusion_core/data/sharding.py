"""How the items of a source become the shards of a dataset version: the plan, and the work on one shard.

Everything here is a function of the scanned source and the configuration, so that any worker can make any shard at any
time and makes the same bytes. A worker holds the pixels of one shard and one encoded image, however large the source.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import DatasetConfig
from diffusion_core.data.shards import SPLITS, Batch, ImageDataset, Record, Shape, commit_shard, write_rejected
from diffusion_core.data.sources import Item, Reader, Scan
from diffusion_core.data.spool import read_spool
from diffusion_core.data.transforms import RejectedItem, Transform, image_size
from diffusion_core.store import Directory, layout

KILLED = "its decoder crashed: the process that read it died, at every attempt"

Rejected = tuple[str, str]  # key, reason
ShardWork = dict[str, Any]  # what became of a shard: `shard`, its record, and `rejected`


@dataclass(frozen=True)
class ShardSpan:
    """Positions `start` to `stop` of the plan's order make one shard."""

    split: str
    start: int
    stop: int

    @property
    def images(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """All that a worker needs to make any shard.

    order: (M,) int64 item numbers, the seeded shuffle of every split, one split after the other.
    labels: (M,) int32 class of each position, or None.
    spooled: number of spool files to read from, None to read from the source.
    """

    directory: Directory
    reader: Reader
    transform: Transform
    shards: tuple[ShardSpan, ...]
    order: np.ndarray
    labels: np.ndarray | None
    has_text: bool
    spooled: int | None = None

    @property
    def image_shape(self) -> Shape:
        return (*self.transform.size, self.transform.config.channels)

    def key(self, position: int) -> str:
        """Where the image at a position of the order comes from."""
        return self.reader.key(int(self.order[position]))

    def items(self, start: int, stop: int, without: frozenset[int] = frozenset()) -> Iterator[Item]:
        """The items at positions `start` to `stop`, in any order; slots count from `start`. Those at the positions
        `without` are not read."""
        positions = np.array([position for position in range(start, stop) if position not in without], np.int64)
        if self.spooled is not None:
            yield from read_spool(self.directory, self.spooled, positions, start)
            return
        for item in self.reader.read(self.order[positions]):
            yield replace(item, slot=int(positions[item.slot]) - start)


def make_plan(directory: Directory, scan: Scan, config: DatasetConfig) -> Plan:
    """Decide splits, order and shards.

    Raises:
        UserError: no candidate, only a test split, or (without `image_size`) no image to take the size from.
    """
    if not len(scan.candidates):
        raise UserError("The source holds no image that can be taken." + _reasons(scan.rejected))
    orders = _split_orders(scan, config)
    transform = Transform(config, config.size or _common_size(scan, config))
    height, width = transform.size
    rows = config.shard_rows(height * width * config.channels)
    spans: list[ShardSpan] = []
    first = 0
    for split, order in orders.items():
        count = -(-len(order) // rows)
        edges = [first + i * len(order) // count for i in range(count + 1)]  # shards of equal size, within one row
        spans += [ShardSpan(split, start, stop) for start, stop in itertools.pairwise(edges)]
        first += len(order)
    order = np.concatenate(list(orders.values()))
    labels = None if scan.labels is None else scan.labels[order]
    return Plan(directory, scan.reader, transform, tuple(spans), order, labels, scan.has_text)


def make_shard(plan: Plan, index: int, killers: frozenset[int] = frozenset()) -> ShardWork:
    """Read, decode and store one shard, and commit it by its record in `work/`. Returns the record.

    Args:
        killers: positions of the images that are known to kill the process; they are rejected unread.

    Raises:
        SourceChanged: the source has changed since it was hashed.
    """
    span = plan.shards[index]
    rows = span.images
    images = np.zeros((rows, *plan.image_shape), np.uint8)
    keys = [""] * rows
    text: list[str | None] = [None] * rows
    taken = np.zeros(rows, bool)
    rejected = [(plan.key(position), KILLED) for position in killers if span.start <= position < span.stop]
    for item in plan.items(span.start, span.stop, killers):
        try:
            images[item.slot] = _pixels(plan, item)
        except RejectedItem as error:
            rejected.append((item.key, str(error)))
            continue
        taken[item.slot], keys[item.slot], text[item.slot] = True, item.key, item.text
    kept = np.flatnonzero(taken)
    if len(kept) + len(rejected) != rows:
        raise RuntimeError(f"shard {index}: {rows} items were asked for, {len(kept) + len(rejected)} came")
    batch = Batch(
        images if len(kept) == rows else images[kept],
        None if plan.labels is None else plan.labels[span.start : span.stop][kept].astype(np.int64),
        [text[row] for row in kept] if plan.has_text else None,
        [keys[row] for row in kept],
    )
    stored: Record = commit_shard(plan.directory, index, span.split, batch) if len(kept) else {"rows": 0}
    record = {"shard": stored, "rejected": sorted(rejected)}
    plan.directory.create_json(layout.finished_shard(index), record)
    return record


def try_images(plan: Plan, start: int, stop: int) -> None:
    """Read and decode the images at positions `start` to `stop`, to see whether the process survives it."""
    for item in plan.items(start, stop):
        with suppress(RejectedItem):
            _pixels(plan, item)


def _pixels(plan: Plan, item: Item) -> np.ndarray:
    if isinstance(item.content, RejectedItem):
        raise item.content
    return plan.transform(item.content)


def finished_shards(plan: Plan) -> dict[int, ShardWork]:
    """Records of the shards that an earlier job has finished, by index."""
    indices = {layout.finished_shard(index): index for index in range(len(plan.shards))}
    there = (entry.key for entry in plan.directory.list(f"{layout.WORK}/"))
    return {indices[key]: plan.directory.read_json(key) for key in there if key in indices}


def check_rejected(
    directory: Directory, rejected: Sequence[Rejected], images: int, total: int, config: DatasetConfig
) -> None:
    """`UserError`, with `rejected.parquet` written, if too large a share of `total` images had to be rejected."""
    if _allowed(images, total, config):
        return
    write_rejected(directory, rejected)
    raise UserError(_too_many(directory, images, total, config, _reasons(rejected)))


def check_reused(dataset: ImageDataset, config: DatasetConfig) -> None:
    """The same for a finished version, which may have been made under a more generous threshold."""
    total = dataset.manifest["source"]["images"]
    images = total - sum(dataset.splits.values())
    if not _allowed(images, total, config):
        raise UserError(_too_many(Directory(dataset.uri), images, total, config, "."))


def _allowed(images: int, total: int, config: DatasetConfig) -> bool:
    return images <= config.max_rejected_fraction * total and images < total


def _too_many(directory: Directory, images: int, total: int, config: DatasetConfig, reasons: str) -> str:
    return (
        f"{images:,} of {total:,} images were rejected, and dataset.max_rejected_fraction = "
        f"{config.max_rejected_fraction:g} allows {int(config.max_rejected_fraction * total):,}{reasons} "
        f"All of them with their reasons are in {directory.uri}/{layout.REJECTED}."
    )


def _split_orders(scan: Scan, config: DatasetConfig) -> dict[str, np.ndarray]:
    """Item numbers of each split that has any, in their final order."""
    from diffusion_core.diffusion.noise import keyed_permutation  # torch: not needed to find that all is done

    unsaid = scan.splits[scan.candidates] < 0
    members = {
        split: scan.candidates[(scan.splits[scan.candidates] == number) | (unsaid & (split == "train"))]
        for number, split in enumerate(SPLITS)
    }
    train = members["train"]
    if not len(train):
        raise UserError(
            "The source has no training images, only "
            + " and ".join(split for split in SPLITS if len(members[split]))
            + " images: set source.splits to none to divide them anew."
        )
    if not len(members["test"]) and config.test_fraction > 0 and len(train) > 1:
        held_out = min(max(1, int(len(train) * config.test_fraction + 0.5)), len(train) - 1)
        chosen = keyed_permutation(config.seed, "data.test", len(train))
        members["test"], members["train"] = train[np.sort(chosen[:held_out])], train[np.sort(chosen[held_out:])]
    return {
        split: items[keyed_permutation(config.seed, f"data.order.{split}", len(items))]
        for split, items in members.items()
        if len(items)
    }


def _common_size(scan: Scan, config: DatasetConfig) -> tuple[int, int]:
    """(height, width) of the first image that can be decoded."""
    why = ""
    for item in itertools.islice(scan.reader.read(scan.candidates[:100]), 100):
        if isinstance(item.content, RejectedItem):
            why = str(item.content)
            continue
        try:
            return image_size(item.content, config)
        except RejectedItem as error:
            why = str(error)
    raise UserError(
        f"dataset.image_size is needed: none of the first 100 images can be decoded to take it from ({why})."
    )


def _reasons(rejected: Sequence[Rejected]) -> str:
    """The three most common reasons, without their details."""
    common = Counter(reason.partition(":")[0] for _, reason in rejected).most_common(3)
    return "; most common: " + ", ".join(f"{reason} ({count:,})" for reason, count in common) + "." if common else "."
