"""A store that is full ends a generation job at once and with one sentence; with room again it is finished."""

from __future__ import annotations

import errno
import os
import uuid

import pytest
import ray
from diffusion_core.generation.verify import verify

from diffusion_core.generation import GenerationConfig, open_imageset
from diffusion_core.generation.plan import Shard
from diffusion_core.generation.worker import ShardWorker
from diffusion_core.jobs.request import Resources
from diffusion_core.stages.work.generate import generate
from diffusion_core.store import Directory, StoreFull
from tests.tiny_bundle import tiny_bundle

SHARDS = 24


class OnAFullDisk(ShardWorker):
    """Stores a trace of every attempt, and from the third shard on nothing else."""

    def make(self, shard: Shard) -> str:
        self._set.directory.write(f"log/attempt-{uuid.uuid4().hex}", b"")
        if shard.number < 2:
            return super().make(shard)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "link", full)
            return super().make(shard)


@pytest.mark.slow
def test_a_full_disk_stops_the_job_at_once_and_with_room_again_it_is_finished(ray_cluster, tmp_path, store):
    bundle = tiny_bundle(tmp_path / "bundle")
    config = GenerationConfig.model_validate(
        {"count": SHARDS, "first_image_id": 0, "batch_size": 1, "images_per_shard": 1, "sampler": {"steps": 2}}
    )
    with ray.init(address=ray_cluster.address, log_to_driver=False):
        with pytest.raises(StoreFull, match=r"^/.*/part-\d+\.parquet cannot be used: the disk is full\.$"):
            generate(bundle, config, store, Resources(workers=2), worker=OnAFullDisk)
        (set_id,) = (Directory(store) / "images").children()
        images = open_imageset(f"{store}/images/{set_id}")
        assert len(list(images.directory.list("log/attempt-"))) <= SHARDS, "the shards were tried again"
        assert not images.directory.exists("failed.parquet")
        done = generate(bundle, config, store, Resources(workers=2))
    assert done.stored == SHARDS and list(verify(images)) == []
