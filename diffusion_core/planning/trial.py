"""A little of the work of each stage, tried on this machine: `python -m diffusion_core.planning.trial <part> <order>`.

As many processes as the stage has workers do a part at once, as they share cores, caches and memory; each says when it
is ready and waits for the others. Everything is written into a scratch folder, and what is learned from is noise of
the real shape: speed does not depend on what the images show.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import Field

from diffusion_core.config import Config, UserError
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.store import Directory, layout

ENOUGH_S = 6.0  # of each part, after its first unit of work
REFUSED = 2  # exit status of a process that says in its last line what the user did wrong
_TRIED_STEPS = 6  # of a sampler
_NOISE_IMAGES = 1024


class Order(Config):
    """What a process of a trial is told. folder: scratch; `bundle_uri`: of the trained model, if there is one."""

    config: PipelineConfig
    folder: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    samples: int
    train_rows: int
    bundle_uri: str | None = None
    digests: dict[str, str] = Field({}, description="SHA-256 of each file of the source.")
    rank: int = 0
    began: float = Field(0.0, description="Unix time at which the process was started.")

    @property
    def device(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


class Measured(Config):
    """What one process found.

    ready_s: seconds until it could begin; figures: by name, in seconds, images a second and bytes.
    """

    ready_s: float
    figures: dict[str, float]
    peak_bytes: int = 0
    peak_gpu_bytes: int = 0


Part = Callable[[Order], Callable[[], dict[str, float]]]  # prepares itself, and returns what is measured


def shard(order: Order) -> Callable[[], dict[str, float]]:
    """Read, decode and store images of the source."""
    from diffusion_core.data.sharding import ShardSpan, make_plan, make_shard
    from diffusion_core.data.sources import open_source

    source = open_source(order.config.source, order.config.store)
    source.limit(order.config.dataset.max_file_mb << 20)
    files = [file.key for file in source.files if source.needs_hash(file)]
    source.exclude({key: "not among what was hashed" for key in files if key not in order.digests})
    plan = make_plan(Directory(order.folder), source.scan(order.digests), order.config.dataset)

    def work() -> dict[str, float]:
        began, images, count, start = time.monotonic(), 0, 16, plan.shards[0].start
        room = plan.shards[0].stop
        here = Directory(order.folder) / f"shards-{order.rank}"
        while (spent := time.monotonic() - began) < ENOUGH_S and start < room:
            span = ShardSpan(plan.shards[0].split, start, min(start + count, room))
            make_shard(replace(plan, directory=here / str(start), shards=(span,)), 0)
            first = images == 0
            images, start, count = images + span.images, span.stop, count * 4
            if first:
                opened = time.monotonic() - began
        spent = time.monotonic() - began
        later = images - 16
        rate = later / (spent - opened) if later > 0 and spent > opened else images / spent
        written = sum(entry.size for entry in here.list() if entry.key.endswith(".parquet"))
        return {"images_per_second": rate, "opened_s": opened, "bytes_per_image": written / max(1, images)}

    return work


def train(order: Order) -> Callable[[], dict[str, float]]:
    """Train for a few seconds, save a checkpoint and export a bundle: the same loop, in a world of its own."""
    from diffusion_core.jobs.record import open_recorder
    from diffusion_core.training.loop import train as train_loop
    from diffusion_core.training.run import TrainSpec, open_run
    from diffusion_core.training.world import World

    config = order.config
    world = World.from_environment()
    training = config.training.model_copy(
        update={
            "images": 10**9,
            "time_budget_s": ENOUGH_S,
            "checkpoint_every_images": 8 * config.training.batch_size,
            "preview_every_images": 0,
            "init_from": None,
        }
    )
    dataset = noise(order)
    spec = TrainSpec(dataset_uri=dataset.uri, process=config.process, network=config.network, training=training)
    run = open_run(order.folder, spec)

    def work() -> dict[str, float]:
        began = time.monotonic()
        recorder = open_recorder(order.folder, run, spec, config.name) if world.leads else None
        recorded = time.monotonic()
        watch = _Watch()
        train_loop(spec, run, world, recorder, watch)
        ended = time.monotonic()
        bundle = run.directory / layout.BUNDLES
        return {
            "record_s": recorded - began,
            "begin_s": watch.times[0] - recorded if watch.times else 0.0,
            "images_per_second": config.training.batch_size / watch.step_s,
            "save_s": watch.save_s,
            "finish_s": ended - watch.times[-1] if watch.times else 0.0,
            "checkpoint_bytes": _newest_bytes(run.checkpoints),
            "bundle_bytes": sum(entry.size for entry in bundle.list()),
        }

    return work


class _Watch:
    """Hears of each step; those after which a checkpoint is saved, one of eight, take longer."""

    def __init__(self) -> None:
        self.total: float | None = None
        self.times: list[float] = []

    def update(self, done: float, **figures: float) -> None:
        if not figures:
            self.times.append(time.monotonic())

    @property
    def _steps(self) -> list[tuple[int, float]]:
        """Number and seconds of each step but the first."""
        return [
            (n, later - sooner) for n, (sooner, later) in enumerate(zip(self.times, self.times[1:], strict=False), 1)
        ]

    @property
    def step_s(self) -> float:
        plain = [s for n, s in self._steps if n % 8 and n > 1] or [s for _, s in self._steps] or [ENOUGH_S]
        return sum(plain) / len(plain)

    @property
    def save_s(self) -> float:
        saving = [s for n, s in self._steps if n % 8 == 0]
        return max(0.0, sum(saving) / len(saving) - self.step_s) if saving else self.step_s


def _newest_bytes(checkpoints: Directory) -> float:
    sizes: dict[int, int] = {}
    for entry in checkpoints.list():
        number = int(entry.key.partition("/")[0])
        sizes[number] = sizes.get(number, 0) + entry.size
    return float(sizes[max(sizes)]) if sizes else 0.0


def sample(order: Order) -> Callable[[], dict[str, float]]:
    """Make batches of images as evaluation and generation would, with fewer steps."""
    import numpy as np

    from diffusion_core.bundle import load_bundle
    from diffusion_core.generation.config import GenerationConfig
    from diffusion_core.generation.worker import Generator
    from diffusion_core.stages.work.guide import with_guides_found

    generation, evaluation = order.config.generation, order.config.evaluation
    ways = {
        "generate": generation,
        "evaluate": GenerationConfig(
            sampler=evaluation.sampler, guidance=evaluation.guidance, batch_size=evaluation.batch_size
        ),
    }
    uri, device = order.bundle_uri or _own_bundle(order), order.device
    classes = len(order.class_names)

    def work() -> dict[str, float]:
        found: dict[str, float] = {}
        for stage, config in ways.items():
            same = next((other for other in found if _makes_alike(ways[other], config)), None)
            found[stage] = found[same] if same else speed(config)
        return {f"{stage}_images_per_second": rate for stage, rate in found.items()}

    def speed(config: GenerationConfig) -> float:
        steps = min(config.sampler.steps, _TRIED_STEPS)
        fewer = config.sampler.model_copy(update={"steps": steps})
        guidance = with_guides_found(config.guidance, order.config.store)
        tried = config.model_copy(update={"sampler": fewer, "guidance": guidance})
        generator = Generator(load_bundle(uri, device), tried, device)
        labels = np.arange(config.batch_size) % classes if classes else None
        ids = np.arange(config.batch_size, dtype=np.int64)
        generator.images(ids, labels)  # the first batch warms up
        began, batches = time.monotonic(), 0
        while batches < 2 or time.monotonic() - began < ENOUGH_S / 2:
            generator.images(ids, labels)
            batches += 1
        batch_s = (time.monotonic() - began) / batches * config.sampler.steps / steps
        return config.batch_size / batch_s

    return work


def _makes_alike(one: Any, other: Any) -> bool:
    """Whether two generations cost the same for each image."""
    fields = ("sampler", "guidance", "batch_size", "precision", "threads")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _own_bundle(order: Order) -> str:
    """The bundle that the trial of training exported."""
    runs = Directory(order.folder) / layout.RUNS
    record = next(entry.key for entry in runs.list() if entry.key.endswith(f"/{layout.BUNDLE}"))
    return f"{runs.uri}/{record.rpartition('/')[0]}"


def figures(order: Order) -> Callable[[], dict[str, float]]:
    """Train the feature extractor for some steps, take features, compute the figures of as many images as there are."""
    import numpy as np

    from diffusion_core.evaluation import report
    from diffusion_core.evaluation.distances import GaussianStatistics
    from diffusion_core.evaluation.features import Features, Measurer, Reference

    config = order.config.evaluation
    dataset = noise(order)
    tried = 24 * config.classifier.batch_size

    def work() -> dict[str, float]:
        def measurer(images: int) -> Measurer:
            fewer = config.model_copy(update={"classifier": config.classifier.model_copy(update={"images": images})})
            return Measurer(fewer, dataset)

        measurer(config.classifier.batch_size)  # the first one warms up
        began = time.monotonic()
        measured = measurer(tried)
        extractor_s = time.monotonic() - began
        images = dataset.read("train", limit=512)
        measured.features(images.images[:256], None if images.labels is None else images.labels[:256])
        began = time.monotonic()
        features = measured.features(images.images, images.labels)
        features_s = time.monotonic() - began
        draw = np.random.default_rng(0)
        values = draw.normal(size=(max(16, order.samples), features.values.shape[1])).astype(np.float32)
        reference = Reference(GaussianStatistics.of(values), values, Features(values))
        began = time.monotonic()
        report.figures(reference, Features(values + 1), config)
        return {
            "extractor_images_per_second": tried / extractor_s,
            "features_per_second": len(images.images) / features_s,
            "figures_s": 2 * (time.monotonic() - began),
        }

    return work


def ray(order: Order) -> Callable[[], dict[str, float]]:
    """Import what every job with workers imports. Ray itself is not started: its start takes a multiple of this."""
    del order

    def work() -> dict[str, float]:
        began = time.monotonic()
        for module in ("ray.data", "ray.train.torch"):
            import_module(module)
        return {"import_s": time.monotonic() - began}

    return work


def noise(order: Order) -> Any:
    """A dataset of noise in the scratch folder, of the real shape and classes."""
    import numpy as np

    from diffusion_core.data.shards import Batch, write_dataset

    draw, classes = np.random.default_rng(0), len(order.class_names)

    def some(count: int) -> Batch:
        images = draw.integers(0, 256, (count, *order.image_shape), np.uint8)
        return Batch(images, np.arange(count) % classes if classes else None)

    count = max(64, min(_NOISE_IMAGES, order.train_rows))
    return write_dataset(order.folder, "noise", {"train": some(count), "test": some(64)}, list(order.class_names))


PARTS: dict[str, Part] = {"shard": shard, "train": train, "sample": sample, "figures": figures, "ray": ray}


def main() -> int:
    """Prepare, say that all is ready, wait for the end of the input, measure, and print what was found."""
    part, path = sys.argv[1:]
    order = Order.model_validate_json(Path(path).read_text())
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
    try:
        work = PARTS[part](order)
        ready_s = time.time() - order.began
        print("ready", flush=True)
        sys.stdin.read()
        found = work()
    except UserError as error:
        print(error, flush=True)
        return REFUSED
    measured = Measured(ready_s=ready_s, figures=found, peak_bytes=_peak(), peak_gpu_bytes=_gpu_peak())
    print(measured.model_dump_json(), flush=True)
    return 0


def _peak() -> int:
    """The most memory that this process ever held; getrusage would tell that of its parent where that was more."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _gpu_peak() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_allocated()) if torch and torch.cuda.is_available() else 0


if __name__ == "__main__":
    sys.exit(main())
