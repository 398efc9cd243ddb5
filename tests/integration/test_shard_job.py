"""The shard job on a real Ray cluster, from local files and from S3."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from diffusion_core.config import UserError
from diffusion_core.data import spool
from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.data.hashing import HashCache
from diffusion_core.data.shards import open_dataset
from diffusion_core.data.sources import open_source
from diffusion_core.stages import shard
from diffusion_core.stages.shard import ShardRequest, ShardResult
from diffusion_core.stages.work import shard as work
from diffusion_core.store import Directory
from tests.image_files import encoded, pixels, shard_here, write_images, write_parquet


def request(store, source: dict, **dataset) -> ShardRequest:
    options = {"name": "x", "image_size": 8, **dataset}
    return ShardRequest(store=str(store), source=SourceConfig(**source), dataset=DatasetConfig(**options))


def program(python: str, place: Path, wanted: ShardRequest) -> subprocess.CompletedProcess:
    """Run the job as a backend does."""
    place.mkdir(exist_ok=True)
    (place / "request.json").write_text(wanted.model_dump_json())
    command = [python, "-m", "diffusion_core.stages", "shard", str(place / "request.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


@pytest.fixture(autouse=True)
def _ray_is_left_as_it_was_found() -> Iterator[None]:
    """A job that fails midway must not leave an execution behind that starts Ray again."""
    yield
    gc.collect()
    assert not ray.is_initialized()


def upload(folder: Path, to: Directory) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            to.create(path.relative_to(folder).as_posix(), path.read_bytes())


def test_two_hundred_files_with_three_broken_ones(ray_cluster, python, tmp_path, store):
    names = [f"{'ab'[i % 2]}/{i}.{'png' if i % 3 else 'jpg'}" for i in range(197)]
    root = write_images(tmp_path / "source", names)
    (root / "a/zero.png").write_bytes(b"")
    (root / "a/words.jpg").write_text("no picture")
    (root / "b/half.png").write_bytes((root / "b/1.png").read_bytes()[:200])
    wanted = request(store, {"uri": str(root)}, rows_per_shard=50)
    done = program(python, tmp_path / "job", wanted)
    assert done.returncode == 0, done.stderr
    assert "@progress" in done.stdout
    result = ShardResult.model_validate_json((tmp_path / "job/result.json").read_bytes())
    assert (result.reused, result.rejected, sum(result.splits.values())) == (False, 3, 197)
    dataset = open_dataset(result.uri)
    assert dict(dataset.rejected()).keys() == {"a/zero.png", "a/words.jpg", "b/half.png"}
    plain = shard_here(tmp_path / "plain", wanted.source, wanted.dataset)
    assert plain.version == dataset.version and plain.manifest["shards"] == dataset.manifest["shards"]
    assert sorted(path.name for path in Path(dataset.uri).iterdir()) == ["manifest.json", "rejected.parquet", "shards"]

    began = time.monotonic()
    again = program(python, tmp_path / "again", wanted)
    assert time.monotonic() - began < 10 and "ray" not in again.stderr.lower()
    assert ShardResult.model_validate_json((tmp_path / "again/result.json").read_bytes()).reused
    assert again.stdout == ""  # nothing was hashed, nothing was made


def test_a_finished_version_is_found_without_ray_and_torch(python, tmp_path, store):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(5)])
    wanted = request(store, {"uri": str(root)})
    made = shard_here(store, wanted.source, wanted.dataset)
    code = (
        "import sys, time; from diffusion_core.stages.shard import run, ShardRequest;"
        f"wanted = ShardRequest.model_validate_json({wanted.model_dump_json()!r});"
        "began = time.monotonic(); result = run(wanted); assert result.reused, result;"
        "assert time.monotonic() - began < 3;"
        "assert not {'ray', 'torch', 'sklearn', 'mlflow', 'prefect'} & set(sys.modules), sorted(sys.modules);"
        "print(result.version)"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == made.version


def test_a_finished_version_is_held_to_the_threshold_of_who_asks(tmp_path, store):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(9)])
    (root / "zero.png").write_bytes(b"")
    strict = request(store, {"uri": str(root)})
    generous = strict.dataset.model_copy(update={"max_rejected_fraction": 0.2})
    shard_here(store, strict.source, generous)
    assert shard.run(strict.model_copy(update={"dataset": generous})).reused
    with pytest.raises(UserError, match=r"^1 of 10 images were rejected"):
        shard.run(strict)


def test_too_many_rejects_end_the_program_with_one_sentence(ray_cluster, python, tmp_path, store):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(9)])
    (root / "zero.png").write_bytes(b"")
    done = program(python, tmp_path / "job", request(store, {"uri": str(root)}))
    assert done.returncode == 2
    sentence = json.loads((tmp_path / "job/error.json").read_text())["error"]
    assert sentence.startswith("1 of 10 images were rejected, and dataset.max_rejected_fraction = 0.05 allows 0")
    assert "Traceback" not in done.stderr


def test_from_s3_to_s3_is_the_same_version_as_locally(ray_cluster, s3_store, tmp_path):
    root = write_images(tmp_path / "source", [f"{'ab'[i % 2]}/{i}.png" for i in range(70)])
    (root / "a/zero.png").write_bytes(b"")
    parquet = write_parquet(tmp_path / "more/train.parquet", [encoded(pixels(i)) for i in range(40)])
    write_parquet(tmp_path / "more/test.parquet", [encoded(pixels(i)) for i in range(40, 50)])
    for local, name in ((root, "folder"), (parquet.parent, "parquet")):
        remote = Directory(s3_store) / f"sources/{name}"
        upload(local, remote)
        here = shard_here(tmp_path / "plain", SourceConfig(uri=str(local)), request("s", {"kind": "digits"}).dataset)
        result = shard.run(request(s3_store, {"uri": remote.uri}))
        there = open_dataset(result.uri)
        assert not result.reused and result.uri.startswith("s3://") and there.version == here.version
        assert there.manifest["shards"] == here.manifest["shards"] and there.rejected() == here.rejected()
        np.testing.assert_array_equal(there.read("test").images, here.read("test").images)
        assert [problem for _, problem in there.verify() if problem] == []
        assert shard.run(request(s3_store, {"uri": remote.uri})).reused
    names = [f"files/{i}.png" for i in range(40)]
    cells = [{"bytes": None if i % 2 else encoded(pixels(i)), "path": name} for i, name in enumerate(names)]
    single = write_parquet(write_images(tmp_path / "single", names) / "x.parquet", cells)
    here = shard_here(tmp_path / "plain", SourceConfig(uri=str(single)), request("s", {"kind": "digits"}).dataset)
    upload(single.parent, Directory(s3_store) / "sources/single")
    result = shard.run(request(s3_store, {"uri": f"{s3_store}/sources/single/x.parquet"}))
    assert (result.version, result.splits) == (here.version, {"train": 36, "test": 4})
    with pytest.raises(UserError, match="is empty"):
        shard.run(request(s3_store, {"uri": f"{s3_store}/nothing/here"}))


def test_a_large_source_is_hashed_and_spooled_by_the_cluster(ray_cluster, tmp_path, store, monkeypatch):
    for name in ("a", "b", "c"):
        first = ord(name) * 100
        write_parquet(
            tmp_path / f"source/{name}.parquet", [encoded(pixels(first + i)) if i else b"" for i in range(30)]
        )
    wanted = request(store, {"uri": str(tmp_path / "source")}, rows_per_shard=20)
    plain = shard_here(tmp_path / "plain", wanted.source, wanted.dataset)
    monkeypatch.setattr(spool, "SPOOL_ABOVE_BYTES", 0)
    monkeypatch.setattr(work, "HASH_HERE_FILES", 0)
    result = shard.run(wanted)
    assert (result.rejected, result.version) == (3, plain.version)
    assert open_dataset(result.uri).manifest["shards"] == plain.manifest["shards"]
    assert not (Path(result.uri) / "work").exists()


def test_a_source_that_is_not_what_was_hashed_stops_the_job_and_is_hashed_again(ray_cluster, tmp_path, store):
    root = write_images(tmp_path / "source", [f"{i}.png" for i in range(10)])
    wanted = request(store, {"uri": str(root)})
    # One file was replaced without a trace since it was hashed: its size and stamp are those that are remembered.
    cache = HashCache(Directory(store) / "datasets/x", str(root))
    for file in open_source(wanted.source).files:
        cache.put(file, "0" * 64 if file.key == "3.png" else hashlib.sha256((root / file.key).read_bytes()).hexdigest())
    cache.save()
    with pytest.raises(UserError, match=r"The source changed while it was sharded: 3\.png has other content now"):
        shard.run(wanted)
    result = shard.run(wanted)
    assert result.version == shard_here(tmp_path / "plain", wanted.source, wanted.dataset).version
