"""A dataset and a network so small that a training run takes a second, and worlds of several processes without Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from diffusion_core.data import Batch, write_dataset
from diffusion_core.networks.config import NetworkConfig, UNetConfig
from diffusion_core.store import Directory
from diffusion_core.training.checkpoint import load_newest
from diffusion_core.training.config import TrainingConfig
from diffusion_core.training.run import RunDirectory, TrainSpec

ROWS, CLASSES = 100, 3


def toy_dataset(store: str, conditional: bool = True, rows: int = ROWS, seed: int = 0) -> str:
    """URI of a dataset version of noisy 8x8 grey images, 7 shards of 16 rows at most."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, rows)
    images = (generator.integers(0, 60, (rows, 8, 8, 1)) + 90 * labels[:, None, None, None]).astype(np.uint8)
    names = [f"class {index}" for index in range(CLASSES)] if conditional else []
    split = {"train": Batch(images, labels if conditional else None)}
    return write_dataset(store, "toy", split, names, rows_per_shard=16).uri


def toy_network(**changes: Any) -> UNetConfig:
    values = {"base_channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "attention_resolutions": (4,)}
    return UNetConfig(**{**values, **changes})


def toy_spec(dataset_uri: str, network: NetworkConfig | None = None, **training: Any) -> TrainSpec:
    """Batches of 10 in microbatches of 4, 4 and 2; one checkpoint in 50 images."""
    values = {
        "batch_size": 10,
        "microbatch_size": 4,
        "images": 200,
        "warmup_images": 50,
        "learning_rate": 1e-3,
        "checkpoint_every_images": 50,
        "log_every_images": 40,
        "preview_every_images": 0,
        "preview_images": 4,
        "preview_steps": 2,
    }
    config = TrainingConfig(**{**values, **training})
    return TrainSpec(dataset_uri=dataset_uri, network=network or toy_network(), training=config)


def toy_request(store: str, spec: TrainSpec, **resources: Any) -> dict[str, Any]:
    """The same as a request of the train stage."""
    return {"store": store, "spec": spec.model_dump(mode="json"), "resources": resources}


class StopAt:
    """Progress and `should_stop` in one: gives `reason` once so many images are seen."""

    total: float | None = None

    def __init__(self, images_seen: int, reason: str) -> None:
        self.images_seen, self.reason, self.done = images_seen, reason, 0.0

    def update(self, done: float, **figures: float) -> None:
        self.done = done

    def __call__(self) -> str | None:
        return self.reason if self.done >= self.images_seen else None


def losses(run: RunDirectory) -> dict[int, float]:
    """The recorded loss by images seen, of a run without MLflow."""
    lines = run.directory.read("metrics.jsonl").decode().splitlines()
    return {line["images_seen"]: line["loss"] for line in map(json.loads, lines)}


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, by part and name, with the images seen."""
    checkpoint = load_newest(run.checkpoints)
    assert checkpoint is not None
    flat = {f"{part}/{name}": tensor for part, tensors in checkpoint.parts.items() for name, tensor in tensors.items()}
    return {"images_seen": torch.tensor(checkpoint.images_seen), **flat}


def assert_same_weights(one: RunDirectory, other: RunDirectory) -> None:
    """The newest checkpoints are equal to the last bit."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, as {different[:3]}"


def copy_of_run(run: RunDirectory, store: str) -> RunDirectory:
    """The same run, with nothing done, in another store (whose dataset is another copy)."""
    return RunDirectory(Directory(store) / f"runs/{run.run_id}")


def start_job(folder: Path, request: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    """The job as the backends start it; `result.json` and `error.json` appear in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(json.dumps(request))
    return subprocess.Popen(
        [sys.executable, "-m", "diffusion_core.stages", "train", str(folder / "request.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def finished_job(
    folder: Path, request: dict[str, Any], timeout: float = 150, **environment: str
) -> tuple[int, str, float]:
    """(exit status, output, seconds)"""
    began = time.monotonic()
    job = start_job(folder, request, **environment)
    try:
        output, _ = job.communicate(timeout=timeout)
    finally:
        job.kill()
    return job.returncode, output, time.monotonic() - began


def run_world(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(world, *arguments)` in `size` processes that are connected by gloo; errors are raised here."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        errors = context.SimpleQueue()
        processes = [
            context.Process(target=_member, args=(rank, size, str(Path(folder, "meet")), errors, function, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        stuck = [process for process in processes if process.is_alive()]
        for process in stuck:
            process.kill()
        if not errors.empty():
            raise AssertionError(errors.get())
        assert not stuck, f"{len(stuck)} of {size} processes did not end"
        assert all(process.exitcode == 0 for process in processes)


def _member(rank: int, size: int, meet: str, errors: Any, function: Any, arguments: Any) -> None:
    import traceback

    from diffusion_core.training.world import World

    try:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
        function(World.join("cpu"), *arguments)
        dist.barrier()
    except BaseException:
        errors.put(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
