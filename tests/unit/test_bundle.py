"""A bundle: written once, verified when read, known by a digest that does not depend on where it lies."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from diffusion_core.bundle import (
    BundleConfig,
    DatasetReference,
    bundle_digest,
    load_bundle,
    read_bundle_config,
    save_bundle,
    verify_bundle,
)
from diffusion_core.config import UserError
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.networks import build_network
from diffusion_core.networks.config import UNetConfig
from diffusion_core.store import Directory

NETWORK = UNetConfig(base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1, head_channels=8)
PNG = b"\x89PNG\r\n\x1a\n picture"


def config(**changes):
    fields = {
        "process": ProcessConfig(timesteps=100),
        "network": NETWORK,
        "image_shape": (8, 8, 1),
        "class_names": ("zero", "one"),
        "dataset": DatasetReference(name="toys", version="abc", uri="/somewhere"),
        "run_id": "r1",
        "images_seen": 128,
        "code_version": "0.1.0",
    }
    return BundleConfig(**{**fields, **changes})


def weights(seed=0, classes=2):
    torch.manual_seed(seed)
    return build_network(NETWORK, (8, 8, 1), classes).state_dict()


@pytest.fixture
def saved(tmp_path):
    place = Directory(tmp_path / "bundle")
    return place, save_bundle(place, config(), weights(), PNG)


def test_a_saved_bundle_gives_back_its_network_process_and_configuration(saved):
    place, digest = saved
    bundle = load_bundle(place.uri)
    assert bundle.config == config() and bundle.digest == digest == bundle_digest(place.uri) == verify_bundle(place.uri)
    assert not bundle.network.training and not any(p.requires_grad for p in bundle.network.parameters())
    for name, tensor in weights().items():
        assert torch.equal(bundle.network.state_dict()[name], tensor), name
    assert len(bundle.process.schedule.betas) == 100
    assert {entry.key for entry in place.list()} == {
        "README.md",
        "bundle.json",
        "config.json",
        "model.safetensors",
        "samples.png",
    }
    card = place.read("README.md").decode()
    assert "toys" in card and "zero, one" in card and "8x8" in card


def test_the_digest_is_of_weights_and_identity_and_not_of_the_place(tmp_path, saved):
    _, digest = saved

    def other(name, **changes):
        seed = changes.pop("seed", 0)
        return save_bundle(Directory(tmp_path / name), config(**changes), weights(seed), PNG)

    elsewhere = DatasetReference(name="toys", version="abc", uri="s3://bucket/elsewhere")
    assert other("moved", dataset=elsewhere, code_version="9") == digest
    assert other("weights", seed=1) != digest
    assert other("longer", images_seen=256) != digest
    assert other("data", dataset=DatasetReference(name="toys", version="abd", uri="/somewhere")) != digest


def test_saving_again_leaves_a_bundle_as_it_is(saved):
    place, digest = saved
    before = {entry.key: place.read(entry.key) for entry in place.list()}
    assert save_bundle(place, config(images_seen=999), weights(5), b"other") == digest
    assert {entry.key: place.read(entry.key) for entry in place.list()} == before


def test_an_interrupted_save_is_not_a_bundle_and_is_repaired_by_saving_again(tmp_path, saved):
    place, digest = saved
    half = Directory(tmp_path / "half")
    half.write("model.safetensors", place.read("model.safetensors")[:100])
    with pytest.raises(UserError, match=r"half is not a model bundle: there is no bundle\.json"):
        load_bundle(half.uri)
    assert save_bundle(half, config(), weights(), PNG) == digest == verify_bundle(half.uri)


class _BeatenAtTheEnd(Directory):
    """Another process saves its bundle after this one has found none there: at its first write."""

    def create(self, key, data):
        save_bundle(Directory(self.uri), config(code_version="winner"), weights(), PNG)
        return super().create(key, data)


def test_who_saves_late_changes_nothing_that_a_record_names(tmp_path, saved):
    late = _BeatenAtTheEnd(tmp_path / "late")
    assert save_bundle(late, config(code_version="loser"), weights(), b"other picture") == saved[1]
    assert verify_bundle(late.uri) == saved[1]
    assert read_bundle_config(late.uri).code_version == "winner" and late.read("samples.png") == PNG


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_or_missing_file_is_named(saved, name):
    place, _ = saved
    data = bytearray(place.read(name))
    data[-5] ^= 1
    place.write(name, bytes(data))
    with pytest.raises(UserError, match=rf"is damaged: {name} differs"):
        load_bundle(place.uri)
    place.delete(name)
    with pytest.raises(UserError, match=rf"is damaged: {name} is missing"):
        load_bundle(place.uri)


def test_verify_looks_at_every_file(saved):
    place, _ = saved
    place.write("samples.png", b"other")
    load_bundle(place.uri)
    with pytest.raises(UserError, match=r"samples\.png differs"):
        verify_bundle(place.uri)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: {**record, "schema_version": 99}, "schema version 99"),
        (lambda record: {**record, "digest": "0" * 16}, "was changed"),
        (lambda record: {**record, "identity": {}}, "was changed"),
        (lambda record: [], "cannot be read"),
        (lambda record: {"digest": "x"}, "cannot be read"),
    ],
)
def test_a_record_that_was_changed_or_is_newer_is_refused(saved, change, said):
    place, _ = saved
    place.write_json("bundle.json", change(place.read_json("bundle.json")))
    with pytest.raises(UserError, match=said):
        bundle_digest(place.uri)


def test_an_older_bundle_without_newer_fields_is_read(saved):
    place, digest = saved
    fields = json.loads(place.read("config.json"))
    del fields["mlflow_run_id"], fields["code_version"]
    _rewrite(place, "config.json", json.dumps(fields).encode())
    assert read_bundle_config(place.uri).code_version == "" and bundle_digest(place.uri) == digest


def test_weights_that_do_not_fit_give_one_sentence(tmp_path):
    place = Directory(tmp_path / "odd")
    save_bundle(place, config(), weights(classes=5), PNG)
    with pytest.raises(UserError, match="do not fit its network"):
        load_bundle(place.uri)


def test_reading_the_record_and_configuration_needs_no_torch(saved):
    code = (
        "import sys; from diffusion_core.bundle import bundle_digest, read_bundle_config;"
        f"bundle_digest({saved[0].uri!r}); read_bundle_config({saved[0].uri!r});"
        "assert not {'torch', 'mlflow', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bundle_can_be_moved(saved, tmp_path):
    place, digest = saved
    shutil.copytree(place.uri, tmp_path / "copy")
    assert load_bundle(f"file://{tmp_path}/copy").digest == digest


def _rewrite(place, name, data):
    import hashlib

    place.write(name, data)
    record = place.read_json("bundle.json")
    record["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    place.write_json("bundle.json", record)
