"""Which image ids a set has, cut into which shards; and which of them a request is about.

A set grows by *extensions*: ranges of image ids that nobody has planned before. `extensions/<n>.json` is created if
absent, so that of two jobs which extend the set at once one gets number n, and the other looks again. Everything else
follows from that log: the number of each shard, the plan tables, the names of the manifests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffusion_core.store import Directory, layout

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """Image ids [first_image_id, first_image_id + count), stored together as `shards/part-<number>`."""

    number: int
    first_image_id: int
    count: int

    @property
    def key(self) -> str:
        return layout.image_shard(self.number)

    @property
    def record_key(self) -> str:
        return f"{self.key}.json"

    @property
    def stop(self) -> int:
        return self.first_image_id + self.count


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to know besides the shard: small, and the same for all workers of a run."""

    set_uri: str
    bundle_uri: str
    model_version: str
    device: str = "cpu"
    guide_uris: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Extension:
    """Image ids [first_image_id, first_image_id + count), in shards numbered from `first_shard`."""

    number: int
    first_image_id: int
    count: int
    first_shard: int

    @property
    def stop(self) -> int:
        return self.first_image_id + self.count

    @property
    def plan_key(self) -> str:
        return layout.set_plan(self.first_image_id)

    @property
    def manifest_key(self) -> str:
        """Exists as soon as every image of the extension is stored."""
        return layout.set_manifest(self.stop - 1)

    @property
    def index_key(self) -> str:
        return layout.set_index(self.stop - 1)

    @property
    def closed_key(self) -> str:
        """Exists if the extension was once finished with fewer failed shards than the threshold allows."""
        return layout.set_closed(self.stop - 1)

    def shard_count(self, images_per_shard: int) -> int:
        return (self.stop - 1) // images_per_shard - self.first_image_id // images_per_shard + 1

    def shards(self, images_per_shard: int) -> list[Shard]:
        """Cut at multiples of `images_per_shard`, so that shards and batches begin together wherever they can."""
        starts = range(self.first_image_id // images_per_shard, (self.stop - 1) // images_per_shard + 1)
        return [self.shard_of(max(self.first_image_id, n * images_per_shard), images_per_shard) for n in starts]

    def shard_of(self, image_id: int, images_per_shard: int) -> Shard:
        """The shard that holds an image id of this extension."""
        nth = image_id // images_per_shard
        first = max(self.first_image_id, nth * images_per_shard)
        stop = min(self.stop, (nth + 1) * images_per_shard)
        return Shard(self.first_shard + nth - self.first_image_id // images_per_shard, first, stop - first)


def read_extensions(directory: Directory) -> list[Extension]:
    """The log of a set, in order."""
    found: list[Extension] = []
    while (extension := _read_extension(directory, len(found))) is not None:
        found.append(extension)
    return found


@dataclass(frozen=True)
class Range:
    """What a request is about: image ids [first, stop).

    `extensions` are those of the log that hold some of them, `gaps` the parts that nobody has planned, and `continues`
    says that an extension which was left unfinished is taken up, though the request did not name its ids.
    """

    first: int
    stop: int
    extensions: list[Extension]
    gaps: list[tuple[int, int]]
    continues: bool


def look(
    directory: Directory,
    first_image_id: int | None,
    count: int,
    unfinished: Callable[[Sequence[Extension]], Sequence[Extension]],
) -> Range:
    """What a request is about, as the log stands; nothing is written.

    With `first_image_id` it is about [first_image_id, first_image_id + count), whatever is there. Without it, an
    extension of the same count that was left unfinished is taken up: so the same command again finishes the work after
    a crash. A request of another count is another request, and like every other takes `count` new ids behind the
    highest that was ever planned.

    Args:
        unfinished: picks, of the log, the extensions that were left unfinished.
    """
    return _look(read_extensions(directory), first_image_id, count, unfinished)


def extend(
    directory: Directory,
    images_per_shard: int,
    first_image_id: int | None,
    count: int,
    unfinished: Callable[[Sequence[Extension]], Sequence[Extension]],
) -> Range:
    """Make sure that every image id of a request (see `look`) is planned; its range, which has no gaps then."""
    while True:
        log = read_extensions(directory)
        wanted = _look(log, first_image_id, count, unfinished)
        if not wanted.gaps:
            return wanted
        (first, stop), *_ = wanted.gaps
        first_shard = log[-1].first_shard + log[-1].shard_count(images_per_shard) if log else 0
        new = Extension(len(log), first, stop - first, first_shard)
        if directory.create_json(layout.extension(new.number), {"schema_version": SCHEMA_VERSION, **asdict(new)}):
            first_image_id = wanted.first  # settled; had another job been faster, it would be open again


def uncovered(log: Sequence[Extension], first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of [first, stop) that no extension of the log has planned, in order."""
    at = first
    for item in sorted(log, key=lambda item: item.first_image_id):
        if item.stop <= at:
            continue
        if item.first_image_id >= stop:
            break
        if item.first_image_id > at:
            yield at, item.first_image_id
        at = item.stop
    if at < stop:
        yield at, stop


def _look(
    log: Sequence[Extension],
    first: int | None,
    count: int,
    unfinished: Callable[[Sequence[Extension]], Sequence[Extension]],
) -> Range:
    left = None
    if first is None:
        left = next((item for item in unfinished(log) if item.count == count), None)
        first = left.first_image_id if left else max((item.stop for item in log), default=0)
    stop = first + count
    touched = [item for item in log if item.first_image_id < stop and first < item.stop]
    return Range(first, stop, touched, list(uncovered(log, first, stop)), left is not None)


def _read_extension(directory: Directory, number: int) -> Extension | None:
    try:
        fields: dict[str, Any] = directory.read_json(layout.extension(number))
    except FileNotFoundError:
        return None
    return Extension(**{name: fields[name] for name in Extension.__dataclass_fields__})
