"""The generation job as it is run: a program, with real Ray Data actors, on a local folder and on S3."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusion_core.generation.verify import verify
from safetensors.torch import load_file, save_file

from diffusion_core.config import UserError, digest
from diffusion_core.generation import GenerationConfig, open_imageset
from diffusion_core.jobs.request import Resources
from diffusion_core.jobs.rows import on_cluster
from diffusion_core.progress import parse_progress
from diffusion_core.stages.generate import GenerateRequest, GenerateResult, run
from diffusion_core.stages.work.generate import generate
from diffusion_core.store import Directory
from diffusion_core.store.layout import BUNDLE, WEIGHTS
from tests.tiny_bundle import tiny_bundle

SETTINGS = {"count": 100, "batch_size": 8, "images_per_shard": 8, "sampler": {"steps": 3}, "guidance": {"scale": 2.0}}


def request_for(store: str, bundle: str, workers: int = 2, **generation) -> GenerateRequest:
    return GenerateRequest(
        store=store,
        model=bundle,
        generation=GenerationConfig.model_validate(SETTINGS | generation),
        resources=Resources(workers=workers, start_timeout_s=10),
    )


def run_program(request: GenerateRequest, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "diffusion_core.stages", "generate", str(folder / "request.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def run_job(store: str, bundle: str, **options) -> GenerateResult:
    return run(request_for(store, bundle, **options))


def stored_files(uri: str, aside: tuple[str, ...] = ("log/",)) -> dict[str, bytes]:
    """Every file of a set that must not depend on how it was made."""
    directory = open_imageset(uri).directory
    return {entry.key: directory.read(entry.key) for entry in directory.list() if not entry.key.startswith(aside)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def session(ray_cluster):
    """Ray initialised already, as the evaluation uses the job's function: one connection for all tests."""
    import ray

    with ray.init(address=ray_cluster.address, log_to_driver=False):
        yield


def test_the_program_starts_its_own_ray_and_then_needs_none(tmp_path, store, bundle):
    done = run_program(request_for(store, bundle), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first = GenerateResult.model_validate_json((tmp_path / "result.json").read_text())
    assert (first.images, first.generated, first.first_image_id, first.total_images) == (100, 100, 0, 100)
    assert not first.reused
    events = [event for line in done.stdout.splitlines() if (event := parse_progress(line))]
    assert (events[-1].stage, events[-1].done, events[-1].total) == ("generate", 100, 100)
    before = stored_files(first.uri)

    again = run_program(request_for(store, bundle, first_image_id=0), tmp_path)
    found = GenerateResult.model_validate_json((tmp_path / "result.json").read_text())
    assert (found.reused, found.generated, found.images, found.set_id) == (True, 0, 100, first.set_id)
    assert found.seconds < 2
    assert "ray" not in again.stderr.lower()
    assert stored_files(first.uri) == before


def test_a_set_is_extended(session, store, bundle):
    first = run_job(store, bundle)
    before = stored_files(first.uri)
    more = run_job(store, bundle, count=20)
    assert (more.first_image_id, more.generated, more.total_images) == (100, 20, 120)
    overlapping = run_job(store, bundle, count=20, first_image_id=110)
    assert (overlapping.images, overlapping.generated, overlapping.total_images) == (20, 10, 130)

    images = open_imageset(first.uri)
    assert list(verify(images)) == []
    pixels, labels = images.read()
    assert labels.tolist() == [n % 10 for n in range(130)]
    assert len(np.unique(pixels.reshape(130, -1), axis=0)) == 130
    after = stored_files(first.uri)
    assert all(after[key] == data for key, data in before.items() if key != "contact-sheet.png")


def test_s3_and_a_folder_hold_the_same_bytes_whatever_the_workers(session, store, s3_store, bundle):
    here = run_job(store, bundle, workers=1)
    there = run_job(s3_store, bundle, workers=2)
    assert there.uri.startswith("s3://")
    assert there.generated == 100
    assert stored_files(there.uri) == stored_files(here.uri)
    assert list(verify(open_imageset(there.uri))) == []
    assert run_job(s3_store, bundle, first_image_id=0).reused


@pytest.mark.parametrize("form", ["webdataset", "png"])
def test_other_formats_hold_the_same_pixels(session, store, s3_store, bundle, form):
    parquet = run_job(store, bundle, count=24)
    other = run_job(s3_store, bundle, count=24, format=form)
    np.testing.assert_array_equal(open_imageset(other.uri).read()[0], open_imageset(parquet.uri).read()[0])
    assert list(verify(open_imageset(other.uri))) == []


def test_generate_leaves_the_session_as_it_was(session, store, bundle):
    import ray

    config = request_for(store, bundle, first_image_id=0, count=24).generation
    done = generate(bundle, config, store, Resources(), stage="samples to evaluate")
    assert ray.is_initialized()
    assert (done.stored, done.generated) == (24, 24)
    assert done.images.read(done.first_image_id, done.stored)[0].shape == (24, 8, 8, 1)
    assert generate(bundle, config, store, Resources()).generated == 0


def test_a_poisonous_shard_does_not_stop_the_rest(session, store, tmp_path, caplog):
    """The embedding of class 3 is not a number, so every image of that class is an error."""
    bundle = tiny_bundle(tmp_path / "bundle")
    poison(bundle)
    labels = [3 if n == 41 else n % 3 for n in range(100)]
    with pytest.raises(UserError) as caught:
        run_job(store, bundle, labels=labels)
    sentence = str(caught.value)
    assert "1 of 13 shards failed, for example shard 5 (images 40 to 47): NonFiniteImages" in sentence
    assert "image 41." in sentence
    assert "generation.max_failed_shards = 0" in sentence

    assert "continuing" not in caplog.text

    allowed = run_job(store, bundle, labels=labels, max_failed_shards=1)
    assert "continuing ids 0..99, which a request of the same count left unfinished" in caplog.text
    assert "generation.first_image_id = 100 asks for the next ones" in caplog.text
    assert (allowed.images, allowed.generated, allowed.total_images) == (92, 0, 92)
    images = open_imageset(allowed.uri)
    assert images.directory.exists("failed.parquet")
    assert not images.directory.exists("manifest-99.json")
    beyond = run_job(store, bundle, labels=labels, count=8)
    assert (beyond.first_image_id, beyond.generated) == (100, 8)


def poison(bundle: str) -> None:
    """Spoil the weights of one class embedding, and make the bundle's record fit."""
    place = Directory(bundle)
    weights = load_file(place.local_path / WEIGHTS)
    (name,) = [name for name, tensor in weights.items() if tensor.ndim == 2 and tensor.shape[0] == 11]
    weights[name][3] = float("nan")
    save_file(weights, place.local_path / WEIGHTS)
    sha256 = hashlib.sha256(place.read(WEIGHTS)).hexdigest()
    record = place.read_json(BUNDLE)
    record["files"][WEIGHTS]["sha256"] = sha256
    record["digest"] = digest(record["identity"], sha256)
    place.write_json(BUNDLE, record)


def test_a_cluster_that_is_too_small_is_said_and_leaves_nothing_unfinished(session, store, bundle):
    request = request_for(store, bundle, workers=64)
    request = request.model_copy(update={"resources": Resources(workers=64, start_timeout_s=1)})
    with pytest.raises(UserError, match="64 CPU needed"):
        run(request)
    assert not list((Directory(store) / "images").list())


def test_resources_that_others_hold_are_named_and_nothing_is_planned(session, store, bundle, caplog):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    request = request_for(store, bundle).model_copy(update={"resources": Resources(workers=2, start_timeout_s=4)})
    both = placement_group([{"CPU": 1}] * 2)
    ray.get(both.ready())
    try:
        with pytest.raises(UserError, match=r"start_timeout_s = 4: 2 CPU needed, 0 of 2 free \(other work .* holds"):
            run(request)
        assert "waiting up to 4 s (resources.start_timeout_s) for 2 workers: 2 CPU needed, 0 of 2 free" in caplog.text
        assert not list(Directory(store).list("images/"))
        with pytest.raises(UserError, match="1 CPU needed, 0 of 2 free"):
            list(on_cluster(lambda row: row, [{}], Resources(workers=1, start_timeout_s=1)))
    finally:
        remove_placement_group(both)
    one = placement_group([{"CPU": 1}])
    ray.get(one.ready())
    try:  # one of two workers is better than none
        assert run(request).generated == 100
        assert "only 1 of 2 workers could start: 2 CPU needed, 1 of 2 free" in caplog.text
    finally:
        remove_placement_group(one)
