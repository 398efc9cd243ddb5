"""Whatever ends a generation job, running it again ends with the same set, byte for byte, and nothing made twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_core.bundle import bundle_digest, read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.generation import GenerationConfig, open_imageset
from diffusion_core.generation.imageset import ImageSet, describe
from diffusion_core.generation.plan import Shard, ShardTask
from diffusion_core.generation.verify import verify
from diffusion_core.generation.worker import ShardWorker
from diffusion_core.jobs.request import Resources
from diffusion_core.stages.generate import GenerateRequest, GenerateResult
from diffusion_core.stages.work.generate import DIED, generate
from tests.tiny_bundle import tiny_bundle

CONFIG = GenerationConfig.model_validate(
    {"count": 192, "first_image_id": 0, "batch_size": 8, "images_per_shard": 8, "sampler": {"steps": 50}}
)
SHARDS, IMAGES = 24, 192


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def uninterrupted(bundle: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the set as they are when nothing goes wrong."""
    images = the_set(str(tmp_path_factory.mktemp("whole")), bundle)
    (extension,) = images.extend(0, CONFIG.count).extensions
    worker = ShardWorker(ShardTask(images.uri, bundle, bundle_digest(bundle)))
    for shard in extension.shards(8):
        worker.make(shard)
    assert images.finish(extension)
    return files_of(images)


@pytest.fixture
def session(ray_cluster) -> Iterator[None]:
    import ray

    with ray.init(address=ray_cluster.address, log_to_driver=False):
        yield


def the_set(store: str, bundle: str) -> ImageSet:
    return describe(store, bundle, bundle_digest(bundle), read_bundle_config(bundle), CONFIG)


def files_of(images: ImageSet) -> dict[str, bytes]:
    keys = [entry.key for entry in images.directory.list() if not entry.key.startswith("log/")]
    return {key: images.directory.read(key) for key in keys}


def start(store: str, folder: Path, bundle: str, config: GenerationConfig = CONFIG) -> subprocess.Popen[str]:
    folder.mkdir(parents=True)
    request = GenerateRequest(store=store, model=bundle, generation=config, resources=Resources(workers=2))
    (folder / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "diffusion_core.stages", "generate", str(folder / "request.json")]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(job: subprocess.Popen[str], folder: Path) -> GenerateResult:
    output, _ = job.communicate(timeout=150)
    assert job.returncode == 0, output[-4000:]
    return GenerateResult.model_validate_json((folder / "result.json").read_text())


def committed(images: ImageSet) -> dict[str, str]:
    """Commit records with the stamp that changes if they are written again."""
    return {entry.key: entry.stamp for entry in images.directory.list("shards/") if entry.key.endswith(".json")}


def wait_for_shards(images: ImageSet, count: int) -> None:
    deadline = time.monotonic() + 90
    while len(committed(images)) < count:
        assert time.monotonic() < deadline, "no shard was committed in time"
        time.sleep(0.05)


def test_the_job_is_interrupted_killed_and_run_again(ray_cluster, tmp_path, store, bundle, uninterrupted):
    images = the_set(store, bundle)
    output = end_midway(images, start(store, tmp_path / "1", bundle), signal.SIGINT)
    assert "Traceback" not in output, output[-4000:]
    assert output.count("generate: stopped by SIGINT") == 1
    first = committed(images)
    end_midway(images, start(store, tmp_path / "2", bundle), signal.SIGKILL)
    before = committed(images)
    assert {key: before[key] for key in first} == first, "a committed shard was written again"

    result = finish(start(store, tmp_path / "3", bundle), tmp_path / "3")
    assert (result.images, result.total_images) == (IMAGES, IMAGES)
    assert 0 < result.generated <= IMAGES - 8 * len(before)
    after = committed(images)
    assert {key: after[key] for key in before} == before, "a committed shard was written again"
    assert files_of(images) == uninterrupted
    assert list(verify(images)) == []


def end_midway(images: ImageSet, job: subprocess.Popen[str], how: signal.Signals) -> str:
    """End the job once it has made a few more shards; what it said."""
    there = len(committed(images))
    wait_for_shards(images, there + 4)
    job.send_signal(how)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == (128 + how if how is signal.SIGINT else -how), output[-4000:]
    assert there + 4 <= len(committed(images)) < SHARDS
    return output


def test_two_jobs_at_once_make_one_set(ray_cluster, tmp_path, store, bundle, uninterrupted):
    """The second waits for the first, also where neither named the ids, and tells of the same images."""
    config = CONFIG.model_copy(update={"first_image_id": None})
    jobs = [start(store, tmp_path / name, bundle, config) for name in "ab"]
    results = [finish(job, tmp_path / name) for job, name in zip(jobs, "ab", strict=True)]
    assert [(result.images, result.first_image_id) for result in results] == [(IMAGES, 0), (IMAGES, 0)]
    assert sorted(result.generated for result in results) == [0, IMAGES]
    assert files_of(the_set(store, bundle)) == uninterrupted


class TellsItsPid(ShardWorker):
    def make(self, shard: Shard) -> str:
        Path(self.task.bundle_uri).with_name("pid").write_text(str(os.getpid()))
        return super().make(shard)


@pytest.mark.slow
def test_a_worker_is_killed_midway(session, store, bundle, uninterrupted):
    images, pid = the_set(store, bundle), Path(bundle).with_name("pid")
    killed = []

    def kill() -> None:
        wait_for_shards(images, 4)
        killed.append(int(pid.read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = generate(bundle, CONFIG, store, Resources(workers=2), worker=TellsItsPid)
    killer.join()
    assert killed
    assert done.stored == IMAGES
    assert files_of(images) == uninterrupted


class DiesOnce(ShardWorker):
    def make(self, shard: Shard) -> str:
        if shard.number == 5 and not self._set.directory.exists("log/died"):
            self._set.directory.write("log/died", b"")
            os._exit(1)
        return super().make(shard)


class DiesAlways(ShardWorker):
    def make(self, shard: Shard) -> str:
        if shard.number in (5, 17):
            os._exit(1)
        return super().make(shard)


@pytest.mark.slow
def test_a_process_that_dies_once_costs_nothing_but_time(session, store, bundle, uninterrupted):
    done = generate(bundle, CONFIG, store, Resources(workers=2), worker=DiesOnce)
    assert done.stored == IMAGES
    assert files_of(done.images) == uninterrupted


@pytest.mark.slow
def test_shards_that_kill_their_process_end_alone_and_are_finished_by_the_next_run(
    session, store, bundle, uninterrupted
):
    with pytest.raises(
        UserError, match=r"2 of 24 shards failed, for example shard 5 \(images 40 to 47\): the worker"
    ) as e:
        generate(bundle, CONFIG.model_copy(update={"max_retries": 1}), store, Resources(workers=2), worker=DiesAlways)
    assert DIED in str(e.value)
    images = the_set(store, bundle)
    assert len(committed(images)) == SHARDS - 2
    assert images.directory.exists("failed.parquet")

    done = generate(bundle, CONFIG, store, Resources(workers=2))
    assert (done.generated, done.stored) == (16, IMAGES)
    assert files_of(open_imageset(images.uri)) == uninterrupted


class Raises(ShardWorker):
    def make(self, shard: Shard) -> str:
        if shard.number % 2:
            raise OSError(5, f"bad luck with shard {shard.number}")
        return super().make(shard)


@pytest.mark.slow
def test_errors_are_retried_a_finite_number_of_times_and_reported(session, store, bundle, uninterrupted):
    import pyarrow as pa
    import pyarrow.parquet as pq

    allowed = CONFIG.model_copy(update={"max_retries": 1, "max_failed_shards": 20})
    done = generate(bundle, allowed, store, Resources(workers=2), worker=Raises)
    assert (done.stored, done.generated) == (96, 96)
    rows = pq.read_table(pa.BufferReader(done.images.directory.read("failed.parquet"))).to_pylist()
    assert [row["shard"] for row in rows] == list(range(1, SHARDS, 2))
    assert rows[0]["error"] == "OSError: [Errno 5] bad luck with shard 1"
    assert {row["attempts"] for row in rows} == {2}
    done = generate(bundle, CONFIG, store, Resources(workers=2))
    assert (done.stored, done.generated) == (IMAGES, 96)
    assert not done.images.directory.exists("failed.parquet")
    ours = files_of(done.images)
    assert ours.pop("closed-191.json")
    assert ours == uninterrupted
