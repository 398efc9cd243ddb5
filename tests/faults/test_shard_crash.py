"""The shard job is killed midway, or an image kills the process that decodes it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_core.config import UserError
from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.data.shards import open_dataset
from diffusion_core.data.transforms import Transform
from diffusion_core.jobs.request import Resources
from diffusion_core.stages import shard
from diffusion_core.stages.shard import ShardRequest, ShardResult
from diffusion_core.stages.work import shard as work
from tests.image_files import encoded, pixels, shard_here, write_images

SHARDS = 24
POISON = encoded(pixels(1000))


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_killed_job_is_finished_by_running_it_again(ray_cluster, python, tmp_path, store):
    root = write_images(tmp_path / "source", [f"{'ab'[i % 2]}/{i}.png" for i in range(480)], size=160)
    (root / "a/zero.png").write_bytes(b"")
    config = DatasetConfig(name="x", image_size=128, rows_per_shard=20, test_fraction=0.1)
    request = ShardRequest(store=store, source=SourceConfig(uri=str(root)), dataset=config)
    (tmp_path / "request.json").write_text(request.model_dump_json())
    command = [python, "-m", "diffusion_core.stages", "shard", str(tmp_path / "request.json")]

    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    finished = wait_for_records(Path(store), 3, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    settle(Path(store))
    version = next((Path(store) / "datasets/x").glob("*/shards")).parent
    assert not (version / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in version.rglob("part-*")}
    assert 3 <= finished <= len(list((version / "work").glob("part-*.json"))) < SHARDS + 2

    subprocess.run(command, check=True, timeout=150, capture_output=True)
    result = ShardResult.model_validate_json((tmp_path / "result.json").read_bytes())
    assert not result.reused and result.rejected == 1 and sum(result.splits.values()) == 480
    for path, stamp in before.items():
        if path.suffix == ".parquet":
            assert path.stat().st_mtime_ns == stamp, f"{path.name} was written twice"
    plain = shard_here(tmp_path / "plain", request.source, config)
    assert open_dataset(result.uri).manifest["shards"] == plain.manifest["shards"]

    uninterrupted = request.model_copy(update={"store": str(tmp_path / "other")})
    (tmp_path / "request.json").write_text(uninterrupted.model_dump_json())
    subprocess.run(command, check=True, timeout=150, capture_output=True)
    assert tree(version) == tree(tmp_path / "other/datasets/x" / version.name)


class Deadly(Transform):
    """A decoder that crashes natively for one image."""

    def __call__(self, item):
        if item == POISON:
            os.abort()
        return super().__call__(item)


def test_an_image_that_kills_its_decoder_is_found_and_rejected(ray_cluster, tmp_path, store, monkeypatch):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(30)])
    (root / "7.png").write_bytes(POISON)
    (root / "zero.png").write_bytes(b"")
    config = DatasetConfig(name="x", image_size=8, rows_per_shard=4, max_rejected_fraction=0.1)
    request = ShardRequest(
        store=store, source=SourceConfig(uri=str(root)), dataset=config, resources=Resources(max_failures=0)
    )
    planned = work.make_plan

    def deadly(*args):
        plan = planned(*args)
        return replace(plan, transform=Deadly(plan.transform.config, plan.transform.size))

    monkeypatch.setattr(work, "make_plan", deadly)
    dataset = open_dataset(shard.run(request).uri)
    rejected = dict(dataset.rejected())
    assert rejected.keys() == {"7.png", "zero.png"} and rejected["7.png"].startswith("its decoder crashed")
    assert sum(dataset.splits.values()) == 29
    assert "7.png" not in dataset.read("train").keys + dataset.read("test").keys
    strict = request.model_copy(update={"dataset": config.model_copy(update={"max_rejected_fraction": 0.04})})
    with pytest.raises(UserError, match=r"^2 of 31 images were rejected"):
        shard.run(strict)


def wait_for_records(store: Path, count: int, job: subprocess.Popen) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        records = len(list(store.glob("datasets/x/*/work/part-*.json")))
        if records >= count:
            return records
        assert job.poll() is None, f"the job ended before it was killed: {job.communicate()[1].decode()}"
        time.sleep(0.005)
    raise AssertionError("the job made no shard within two minutes")


def settle(store: Path) -> None:
    """Wait until the workers of the killed driver are gone: nothing is written any more."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 2:
        now = len(list(store.rglob("part-*")))
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.05)
