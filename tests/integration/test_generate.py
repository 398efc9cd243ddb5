"""The generation job as it is run: a program, with real Ray Data actors, on a local folder and on S3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_core.generation import GenerationConfig, open_imageset
from diffusion_core.jobs.generate import generate
from diffusion_core.jobs.requests import GenerateRequest, GenerateResult, Resources
from diffusion_core.progress import parse_progress
from tests.tiny_bundle import tiny_bundle

SETTINGS = {"count": 100, "batch_size": 8, "images_per_shard": 8, "sampler": {"steps": 3}, "guidance": {"scale": 2.0}}


def run_job(store: str, folder: Path, bundle: str, workers: int = 2, check: bool = True, **generation):
    """Run the job as a program; its result, or the finished process if it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    request = GenerateRequest(
        store=store,
        model=bundle,
        generation=GenerationConfig.model_validate(SETTINGS | generation),
        resources=Resources(workers=workers, start_timeout_s=60),
    )
    (folder / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "diffusion_core.jobs.generate", str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    if not check:
        return done
    assert done.returncode == 0, done.stderr[-4000:]
    result = GenerateResult.model_validate_json((folder / "result.json").read_text())
    return result, done.stdout


def stored_files(uri: str, aside: tuple[str, ...] = ("log/",)) -> dict[str, bytes]:
    """Every file of a set that must not depend on how it was made."""
    directory = open_imageset(uri).directory
    return {entry.key: directory.read(entry.key) for entry in directory.list() if not entry.key.startswith(aside)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("model") / "bundle")


def test_a_set_is_made_found_done_and_extended(ray_cluster, tmp_path, store, bundle):
    first, output = run_job(store, tmp_path / "1", bundle)
    assert (first.images, first.generated, first.first_image_id, first.total_images) == (100, 100, 0, 100)
    assert not first.reused
    events = [event for line in output.splitlines() if (event := parse_progress(line))]
    assert (events[-1].stage, events[-1].done, events[-1].total) == ("generate", 100, 100)
    before = stored_files(first.uri)

    again, _ = run_job(store, tmp_path / "2", bundle, first_image_id=0)
    assert (again.reused, again.generated, again.images, again.set_id) == (True, 0, 100, first.set_id)
    assert again.seconds < 2
    assert stored_files(first.uri) == before

    more, _ = run_job(store, tmp_path / "3", bundle, count=20)
    assert (more.first_image_id, more.generated, more.total_images) == (100, 20, 120)
    overlapping, _ = run_job(store, tmp_path / "4", bundle, count=20, first_image_id=110)
    assert (overlapping.images, overlapping.generated, overlapping.total_images) == (20, 10, 130)

    images = open_imageset(first.uri)
    assert images.verify() == []
    pixels, labels = images.read()
    assert labels.tolist() == [n % 10 for n in range(130)]
    assert len(np.unique(pixels.reshape(130, -1), axis=0)) == 130
    after = stored_files(first.uri)
    assert all(after[key] == data for key, data in before.items() if key != "contact-sheet.png")


def test_s3_and_a_folder_hold_the_same_bytes_whatever_the_workers(ray_cluster, tmp_path, store, s3_store, bundle):
    here, _ = run_job(store, tmp_path / "1", bundle, workers=1)
    there, _ = run_job(s3_store, tmp_path / "2", bundle, workers=2)
    assert there.uri.startswith("s3://")
    assert there.generated == 100
    assert stored_files(there.uri) == stored_files(here.uri)
    assert open_imageset(there.uri).verify() == []
    again, _ = run_job(s3_store, tmp_path / "3", bundle, first_image_id=0)
    assert again.reused


@pytest.mark.parametrize("form", ["webdataset", "png"])
def test_other_formats_hold_the_same_pixels(ray_cluster, tmp_path, store, s3_store, bundle, form):
    parquet, _ = run_job(store, tmp_path / "1", bundle, count=24)
    other, _ = run_job(s3_store, tmp_path / "2", bundle, count=24, format=form)
    np.testing.assert_array_equal(open_imageset(other.uri).read()[0], open_imageset(parquet.uri).read()[0])
    assert open_imageset(other.uri).verify() == []


def test_without_a_cluster_the_job_starts_its_own(tmp_path, store, bundle):
    result, _ = run_job(store, tmp_path / "1", bundle, count=20, workers=1)
    assert result.generated == 20


def test_generate_inside_a_ray_session(ray_cluster, tmp_path, store, bundle):
    """As the evaluation uses it: Ray is initialised already, and stays so."""
    import ray

    config = GenerationConfig.model_validate(SETTINGS | {"first_image_id": 0})
    with ray.init(address=ray_cluster.address, log_to_driver=False):
        done = generate(bundle, config, store, Resources(), stage="evaluate")
        assert ray.is_initialized()
    assert (done.stored, done.generated) == (100, 100)
    assert done.images.read(done.first_image_id, done.stored)[0].shape == (100, 8, 8, 1)
    assert generate(bundle, config, store, Resources()).generated == 0
    assert not ray.is_initialized()


def test_a_poisonous_shard_does_not_stop_the_rest(ray_cluster, tmp_path, store):
    """The embedding of class 3 is not a number, so every image of that class is an error."""
    from safetensors.torch import load_file, save_file

    bundle = tiny_bundle(tmp_path / "bundle")
    poison(bundle, load_file, save_file)
    labels = [3 if n == 41 else n % 3 for n in range(100)]
    failed = run_job(store, tmp_path / "1", bundle, check=False, labels=labels)
    assert failed.returncode == 2
    sentence = json.loads((tmp_path / "1" / "error.json").read_text())["error"]
    assert "1 of 13 shards failed, for example shard 5 (images 40 to 47)" in sentence
    assert "NonFiniteImages" in sentence
    assert "image 41" in sentence
    assert "generation.max_failed_shards = 0" in sentence

    allowed, _ = run_job(store, tmp_path / "2", bundle, labels=labels, max_failed_shards=1)
    assert (allowed.images, allowed.generated, allowed.total_images) == (92, 0, 92)
    images = open_imageset(allowed.uri)
    assert images.directory.exists("failed.parquet")
    assert not images.directory.exists("manifest-99.json")
    beyond, _ = run_job(store, tmp_path / "3", bundle, labels=labels, count=8)
    assert (beyond.first_image_id, beyond.generated) == (100, 8)


def poison(bundle, load_file, save_file):
    """Make the weights of one class embedding infinite, and the records fit."""
    import hashlib

    from diffusion_core.bundle import RECORD, WEIGHTS, bundle_digest
    from diffusion_core.config import digest
    from diffusion_core.storage import Directory

    place = Directory(bundle)
    weights = load_file(place.local_path / WEIGHTS)
    (name,) = [name for name, tensor in weights.items() if tensor.ndim == 2 and tensor.shape[0] == 11]
    weights[name][3] = float("nan")
    save_file(weights, place.local_path / WEIGHTS)
    sha256 = hashlib.sha256(place.read(WEIGHTS)).hexdigest()
    record = place.read_json(RECORD)
    record["files"][WEIGHTS]["sha256"] = sha256
    record["digest"] = digest(record["identity"], sha256)
    place.write_json(RECORD, record)
    bundle_digest(bundle)


def test_a_cluster_that_is_too_small_is_said(ray_cluster, tmp_path, store, bundle):
    request = GenerateRequest(
        store=store, model=bundle, resources=Resources(workers=64, start_timeout_s=2), generation=SETTINGS
    )
    (tmp_path / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "diffusion_core.jobs.generate", str(tmp_path / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "64 CPU needed" in (tmp_path / "error.json").read_text()
