"""The image set on disk: append-only, committed shard by shard, and able to tell what was changed."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusion_core.generation.verify import verify
from PIL import Image

from diffusion_core.bundle import bundle_digest, read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.generation import GenerationConfig, open_imageset
from diffusion_core.generation.imageset import describe
from diffusion_core.generation.labels import Labels
from diffusion_core.generation.plan import ShardTask
from diffusion_core.generation.sheet import MAX_BYTES, choose_images, contact_sheet
from diffusion_core.generation.worker import ShardWorker, reproduce

FORMS = ["parquet", "webdataset", "png"]


def settings(**fields):
    return GenerationConfig(**({"batch_size": 8, "images_per_shard": 16, "sampler": {"steps": 2}} | fields))


def plan(store, uri, config):
    return describe(str(store), uri, bundle_digest(uri), read_bundle_config(uri), config)


def make(store, uri, config, backwards=False):
    """What the job does, in this process and without Ray."""
    images = plan(store, uri, config)
    wanted = images.extend(config.first_image_id, config.count)
    missing = images.missing(wanted)
    worker = ShardWorker(ShardTask(images.uri, uri, "tiny/1"))
    for shard in reversed(missing) if backwards else missing:
        row = {"shard": shard.number, "first_image_id": shard.first_image_id, "count": shard.count}
        assert worker(row)["outcome"] == "made"
    assert all(images.finish(extension) for extension in wanted.extensions)
    return images


def files_of(images):
    return {entry.key: images.directory.read(entry.key) for entry in images.directory.list()}


@pytest.mark.parametrize("form", FORMS)
def test_a_set_is_read_back_and_is_in_order(tmp_path, bundle_uri, form):
    images = open_imageset(make(tmp_path, bundle_uri, settings(count=40, format=form)).uri)
    pixels, labels = images.read()
    assert pixels.shape == (40, 8, 8, 1)
    assert labels.tolist() == [n % 10 for n in range(40)]
    some, _ = images.read(15, 3)
    np.testing.assert_array_equal(some, pixels[15:18])
    assert list(verify(images)) == []
    assert images.total_images() == 40
    with pytest.raises(UserError, match="Image 40 is not in the image set"):
        images.read(39, 2)


def test_contract_of_the_directory(tmp_path, bundle_uri):
    images = make(tmp_path, bundle_uri, settings(count=40, seed=3))
    directory = images.directory
    assert images.uri == f"{tmp_path}/images/{images.description.set_id}"
    manifest = directory.read_json("manifest-39.json")
    plan_rows = pq.read_table(pa.BufferReader(directory.read("plan-0.parquet"))).to_pylist()
    assert [row["key"] for row in plan_rows] == ["shards/part-00000", "shards/part-00001", "shards/part-00002"]
    assert plan_rows[2] == plan_rows[2] | {"first_image_id": 32, "count": 8, "labels": [2, 3, 4, 5, 6, 7, 8, 9]}
    index = pq.read_table(pa.BufferReader(directory.read("index-39.parquet"))).to_pylist()
    assert [row["image_id"] for row in index] == list(range(40))
    pixels, _ = images.read()
    for row, image in zip(index, pixels, strict=True):
        assert row["sha256"] == hashlib.sha256(image.tobytes()).hexdigest()
        assert (row["shard"], row["seed"], row["label"]) == (row["image_id"] // 16, 3, row["image_id"] % 10)
    for shard in manifest["shards"]:
        record = directory.read_json(f"shards/part-{shard['shard']:05d}.json")
        assert record["sha256"] == shard["sha256"] == hashlib.sha256(directory.read(shard["key"])).hexdigest()
        assert record["model_version"] == "tiny/1"
        assert record["configuration_digest"] == images.description.set_id
        assert "torch" in record["made_on"]
    assert manifest["images_per_class"] == {str(n): 4 for n in range(10)}
    sheet = directory.read("contact-sheet.png")
    assert 200 < Image.open(io.BytesIO(sheet)).width < 260  # four images of each class, none of them twice
    images.draw_sheet()  # it does not depend on who draws it, before the manifest is there or after it
    assert directory.read("contact-sheet.png") == sheet


@pytest.mark.parametrize("form", FORMS)
def test_order_of_the_shards_makes_no_difference_to_any_byte(tmp_path, bundle_uri, form):
    config = settings(count=40, format=form)
    forth = make(tmp_path / "a", bundle_uri, config)
    back = make(tmp_path / "b", bundle_uri, config, backwards=True)
    assert files_of(forth) == files_of(back)


def test_a_set_grows_by_whole_shards_and_what_was_there_stays(tmp_path, bundle_uri):
    before = files_of(make(tmp_path, bundle_uri, settings(count=20)))
    images = make(tmp_path, bundle_uri, settings(count=30))
    after = files_of(images)
    assert {key: after[key] for key in before if key != "contact-sheet.png"} == {
        key: data for key, data in before.items() if key != "contact-sheet.png"
    }
    assert {"plan-20.parquet", "manifest-49.json", "shards/part-00002.parquet"} <= set(after)
    in_one = make(tmp_path / "other", bundle_uri, settings(count=50))
    np.testing.assert_array_equal(images.read()[0], in_one.read()[0])
    assert list(verify(images)) == []


@pytest.mark.parametrize("first", [3, 16, 37])
def test_any_range_gives_the_same_pixels(tmp_path, bundle_uri, first):
    whole = make(tmp_path / "whole", bundle_uri, settings(count=60)).read()[0]
    part = make(tmp_path / "part", bundle_uri, settings(count=20, first_image_id=first))
    np.testing.assert_array_equal(part.read(first, 20)[0], whole[first : first + 20])
    assert make(tmp_path / "part", bundle_uri, settings(count=60, first_image_id=0)).total_images() == 60
    np.testing.assert_array_equal(part.read()[0], whole)


def test_who_loses_the_race_records_what_is_stored(tmp_path, bundle_uri):
    images = plan(tmp_path, bundle_uri, settings(count=16))
    (extension,) = images.extend(None, 16).extensions
    (shard,) = extension.shards(16)
    stored, late = np.zeros((2, 16, 8, 8, 1), np.uint8) + np.array([10, 20], np.uint8).reshape(2, 1, 1, 1, 1)
    images.commit(shard, stored, "tiny/1", "here")
    images.directory.delete(shard.record_key)  # as if the winner died between data and record
    record = images.commit(shard, late, "tiny/1", "there")
    assert record["images"] == [hashlib.sha256(stored[0].tobytes()).hexdigest()] * 16
    assert record["made_on"] == "unknown"
    assert images.finish(extension)
    assert list(verify(images)) == []
    assert images.commit(shard, late, "tiny/2", "elsewhere") == record


def test_an_incomplete_extension_is_not_finished_and_is_taken_up_again(tmp_path, bundle_uri):
    config = settings(count=40)
    images = plan(tmp_path, bundle_uri, config)
    wanted = images.extend(None, 40)
    worker = ShardWorker(ShardTask(images.uri, bundle_uri, "tiny/1"))
    worker({"shard": 1, "first_image_id": 16, "count": 16})
    assert not images.finish(wanted.extensions[0])
    assert images.total_images() == 16
    assert [shard.number for shard in images.missing(wanted)] == [0, 2]
    assert images.read(20, 4)[0].shape == (4, 8, 8, 1)
    assert "shard 0 (images 0 to 15) has not been made yet" in next(verify(images))
    assert images.look(None, 40).continues and not images.look(0, 40).continues
    other = images.look(None, 8)
    assert (other.first, other.stop, other.continues) == (40, 48, False), "another count is another request"
    assert files_of(make(tmp_path, bundle_uri, config)) == files_of(make(tmp_path / "b", bundle_uri, config))
    assert not images.look(None, 40).continues
    make(tmp_path, bundle_uri, config)
    assert images.total_images() == 80


def test_the_id_of_a_set_is_of_what_makes_its_pixels(tmp_path, bundle_uri, unconditional_uri):
    def set_id(uri=bundle_uri, **fields):
        return plan(tmp_path, uri, settings(**fields)).description.set_id

    same = [{}, {"count": 7}, {"first_image_id": 3}, {"max_retries": 9}, {"label_column": "kind"}]
    assert len({set_id(**fields) for fields in same}) == 1
    others = [{"seed": 1}, {"labels": ["3"]}, {"labels": [4]}, {"sampler": {"steps": 3}}, {"batch_size": 4}]
    others += [{"format": "png"}, {"threads": 2}, {"precision": "bfloat16"}, {"guidance": {"scale": 2}}, {}]
    assert len({set_id(**fields) for fields in others}) == len(others)
    assert set_id(labels=["3"]) == set_id(labels=[3])
    assert set_id(unconditional_uri) != set_id()


def test_listed_labels_are_kept_with_the_set(tmp_path, bundle_uri):
    path = tmp_path / "labels.txt"
    path.write_text("3\n1\n4\n")
    images = make(tmp_path, bundle_uri, settings(count=20, labels=str(path)))
    path.unlink()
    again = open_imageset(images.uri)
    assert again.read(0, 4)[1].tolist() == [3, 1, 4, 3]
    assert list(verify(again)) == []
    assert reproduce(images.uri, 17)[1]


@pytest.mark.parametrize("form", FORMS)
def test_every_image_can_be_made_again(tmp_path, bundle_uri, form):
    images = make(tmp_path, bundle_uri, settings(count=20, format=form))
    pixels, same = reproduce(images.uri, 19)
    assert same
    np.testing.assert_array_equal(pixels, images.read(19, 1)[0][0])
    located = images.locate(19)
    assert (located.shard.number, located.label, located.record["model_version"]) == (1, 9, "tiny/1")
    with pytest.raises(UserError, match="Image 20 is not in"):
        images.locate(20)


def test_verify_names_the_image_whose_pixels_were_changed(tmp_path, bundle_uri):
    images = make(tmp_path, bundle_uri, settings(count=20, format="png"))
    image = images.read(17, 1)[0][0, ..., 0].copy()
    image[0, 0] ^= 1
    Image.fromarray(image).save(f"{images.uri}/shards/part-00001/000000017.png")
    (finding,) = verify(images)
    assert finding.startswith("image 17 (shard 1): its pixels differ")


@pytest.mark.parametrize(
    ("form", "key", "expected"),
    [
        ("parquet", "shards/part-00001.parquet", "shard 1 (images 16 to 19)"),
        ("webdataset", "shards/part-00000.tar", "shard 0 (images 0 to 15)"),
        ("png", "shards/part-00001/metadata.jsonl", "shard 1 (images 16 to 19)"),
        ("parquet", "plan-0.parquet", "plan-0.parquet"),
        ("parquet", "index-19.parquet", "index-19.parquet"),
    ],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_verify_names_what_is_damaged(tmp_path, bundle_uri, form, key, expected, damage):
    images = make(tmp_path, bundle_uri, settings(count=20, format=form))
    data = bytearray(images.directory.read(key))
    data[len(data) // 2] ^= 1
    if damage == "remove":
        images.directory.delete(key)
    else:
        images.directory.write(key, bytes(data) if damage == "flip" else bytes(data[: len(data) // 2]))
    findings = list(verify(images))
    assert findings
    assert all(expected in finding or f"shard {expected[6]})" in finding for finding in findings)


def test_verify_sees_a_lost_record(tmp_path, bundle_uri):
    images = make(tmp_path, bundle_uri, settings(count=20))
    images.directory.delete("shards/part-00001.json")
    assert list(verify(images)) == ["shard 1 (images 16 to 19): its commit record shards/part-00001.json is missing."]


def test_what_does_not_suit_the_model_is_said(tmp_path, bundle_uri, unconditional_uri):
    with pytest.raises(UserError, match=r"sampler.steps: 2000 is more than the 1000"):
        plan(tmp_path, bundle_uri, settings(sampler={"steps": 2000}))
    with pytest.raises(UserError, match=r"guidance.scale: 3 is not accepted for a model without classes"):
        plan(tmp_path, unconditional_uri, settings(guidance={"scale": 3}))
    with pytest.raises(UserError, match=r"no class 'zebra'; accepted are 0, 1, 2"):
        plan(tmp_path, bundle_uri, settings(labels=["zebra"]))
    with pytest.raises(UserError, match="is not an image set"):
        open_imageset(tmp_path)


def test_the_worker_reports_an_error_as_a_row(tmp_path, bundle_uri):
    images = plan(tmp_path, bundle_uri, settings(count=16))
    images.extend(None, 16)
    row = ShardWorker(ShardTask(images.uri, f"{tmp_path}/nowhere", "v"))({"shard": 0, "first_image_id": 0, "count": 16})
    assert (row["outcome"], row["final"]) == ("failed", False)
    assert "not a model bundle" in row["error"]


def test_shards_made_with_another_bundle_are_refused(tmp_path, bundle_uri, unconditional_uri):
    images = plan(tmp_path, bundle_uri, settings(count=16))
    images.extend(None, 16)
    row = ShardWorker(ShardTask(images.uri, unconditional_uri, "v"))({"shard": 0, "first_image_id": 0, "count": 16})
    assert "is not the one that the image set was planned with" in row["error"]


def test_images_of_the_sheet_are_balanced():
    rows = choose_images([(0, 1000)], Labels(10))
    assert [len(ids) for ids in rows.values()] == [10] * 10
    assert rows[3] == list(range(3, 100, 10))
    many = choose_images([(0, 100_000)], Labels(1000))
    assert len(many) == 16
    assert all(len(ids) == 10 for ids in many.values())
    rare = choose_images([(5, 8), (100, 103)], Labels(2, np.array([0, 0, 0, 0, 0, 0, 1])))
    assert rare == {0: [5, 7, 100, 101, 102], 1: [6]}
    assert choose_images([(7, 9), (20, 400)], Labels(0)) == {None: [7, 8, *range(20, 118)]}


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (28, 28, 1), (32, 32, 3), (256, 128, 3)])
@pytest.mark.parametrize("classes", [0, 1, 16])
def test_the_sheet_is_large_enough_to_be_seen_and_small_enough_to_be_sent(height, width, channels, classes):
    noise = np.random.default_rng(0).integers(0, 256, (160, height, width, channels), dtype=np.uint8)
    rows = {f"class {n}": list(noise[10 * n : 10 * n + 10]) for n in range(classes)} or {"": list(noise[:100])}
    data = contact_sheet(rows)
    assert len(data) < MAX_BYTES
    sheet = Image.open(io.BytesIO(data))
    assert sheet.mode == ("L" if channels == 1 else "RGB")
    assert max(sheet.size) >= 200


def test_the_sheet_shows_small_images_pixel_by_pixel():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet({"": [image]}))))
    np.testing.assert_array_equal(sheet[4:52, 4:52], np.kron(image[..., 0], np.ones((6, 6), np.uint8)))


def test_configuration_and_plans_need_no_torch():
    code = "import sys, json; import diffusion_core.generation, diffusion_core.generation.imageset; "
    code += "print(json.dumps([name in sys.modules for name in ('torch', 'ray', 'mlflow')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False, False]
