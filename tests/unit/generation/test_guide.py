"""Autoguidance from the configuration to the pixels: whose weights guide is part of what an image is."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from diffusion_core.bundle import bundle_digest, load_bundle, read_bundle_config
from diffusion_core.catalog import reproduce as catalog_reproduce
from diffusion_core.catalog.lineage import lineage
from diffusion_core.config import UserError, digest
from diffusion_core.diffusion import Denoiser, GuidanceConfig, KeyedNoise, build_sampler, images_from_network
from diffusion_core.generation import GenerationConfig, open_imageset
from diffusion_core.generation.imageset import describe
from diffusion_core.generation.labels import Labels
from diffusion_core.generation.plan import ShardTask
from diffusion_core.generation.worker import Generator, NonFiniteImages, ShardWorker, reproduce
from diffusion_core.stages.checks import check_guidance
from tests.tiny_bundle import tiny_bundle

BALANCED = Labels(10).of


def settings(guide, scale=2.0, **fields):
    fields = {"batch_size": 8, "images_per_shard": 16, "sampler": {"steps": 2}, "count": 16} | fields
    return GenerationConfig(guidance={"scale": scale, "guide": guide}, **fields)


def plan(store, uri, config):
    return describe(str(store), uri, bundle_digest(uri), read_bundle_config(uri), config)


def make(images, uri, guide=None):
    shard = images.missing(images.extend(0, 16))[0]
    row = {"shard": shard.number, "first_image_id": 0, "count": 16}
    return ShardWorker(ShardTask(images.uri, uri, "tiny/1", guide_uris={"guide": guide} if guide else {}))(row)


def test_images_are_those_of_the_guided_denoiser(bundle_uri, guide_uri):
    config = settings(guide_uri, scale=2.5)
    made = Generator(load_bundle(bundle_uri), config).images(np.arange(8), BALANCED)
    bundle, guide = load_bundle(bundle_uri), load_bundle(guide_uri)
    denoiser = Denoiser(
        bundle.process,
        bundle.network,
        {"label": torch.arange(8)},
        GuidanceConfig(scale=2.5),
        config.sampler,
        guide.network,
    )
    noise = KeyedNoise(0, range(8))
    with torch.inference_mode():
        x_0 = build_sampler(config.sampler, bundle.process).sample(denoiser, noise.initial((1, 8, 8)), noise)
    np.testing.assert_array_equal(made, images_from_network(x_0))
    free = Generator(bundle, settings(None, scale=2.5)).images(np.arange(8), BALANCED)
    assert not np.array_equal(made, free), "not the same as leaving the label out"


def test_at_a_scale_of_one_the_guide_is_not_even_loaded(bundle_uri):
    nowhere = Generator(load_bundle(bundle_uri), settings("/nowhere", scale=1.0)).images(np.arange(8), BALANCED)
    without = Generator(load_bundle(bundle_uri), settings(None, scale=1.0)).images(np.arange(8), BALANCED)
    np.testing.assert_array_equal(nowhere, without)


def test_a_model_without_classes_is_guided_by_another(unconditional_uri, tmp_path):
    guide = tiny_bundle(tmp_path / "guide", class_names=(), image_shape=(4, 8, 3), seed=2)
    images = plan(tmp_path, unconditional_uri, settings(guide))
    assert make(images, unconditional_uri)["outcome"] == "made"
    with pytest.raises(UserError, match=r"guidance\.scale: 2 is not accepted .* without classes, .* or a guide"):
        plan(tmp_path, unconditional_uri, settings(None))


def test_the_digest_of_the_guide_is_part_of_the_set_and_not_its_place(tmp_path, bundle_uri, guide_uri):
    copy = str(tmp_path / "copy")
    shutil.copytree(guide_uri, copy)
    set_id = plan(tmp_path, bundle_uri, settings(guide_uri)).description.set_id
    assert plan(tmp_path, bundle_uri, settings(copy)).description.set_id == set_id
    others = (settings(None), settings(bundle_uri), settings(guide_uri, scale=3.0))
    assert len({set_id, *(plan(tmp_path, bundle_uri, other).description.set_id for other in others)}) == 4
    neutral = [plan(tmp_path, bundle_uri, settings(guide, scale=1.0)) for guide in (None, guide_uri)]
    assert neutral[0].description.set_id == neutral[1].description.set_id
    assert digest(GuidanceConfig(scale=2)) == "6cc27f2f343ca758", "as in the first release"


def test_a_set_remembers_its_guide_finds_it_where_it_is_and_refuses_another(tmp_path, bundle_uri):
    there, moved = tmp_path / "there", tmp_path / "moved"
    guide = tiny_bundle(there, seed=1)
    images = plan(tmp_path, bundle_uri, settings(guide))
    assert make(images, bundle_uri)["outcome"] == "made"
    planned = {"digest": bundle_digest(guide), "run_id": read_bundle_config(guide).run_id}
    assert images.description.guides == {"guide": planned}
    assert reproduce(images.uri, 3)[1]
    assert catalog_reproduce.reproduce(images.uri, str(tmp_path), [5])[0]["same"]
    assert lineage(images.uri, str(tmp_path))[0]["guide"] == bundle_digest(guide)
    there.rename(moved)
    stored = open_imageset(images.uri)
    assert stored.guided_by({"guide": str(moved)}).guidance.guide == str(moved)
    with pytest.raises(UserError, match="is not a model bundle"):
        stored.guided_by()
    images.directory.delete("shards/part-00000.json")
    row = make(images, bundle_uri, guide=bundle_uri)
    assert row["outcome"] == "failed" and "is not that which the image set" in row["error"]
    assert make(images, bundle_uri, guide=str(moved))["outcome"] == "made"


def test_a_poisoned_guide_is_an_error_and_no_pixel(bundle_uri, guide_uri, monkeypatch):
    class Poisoned(torch.nn.Module):
        null_label = 10

        def forward(self, x_t, t, label):
            return torch.where(label == 3, torch.inf, 0.0)[:, None, None, None] * torch.ones_like(x_t)

    poisoned = dataclasses.replace(load_bundle(guide_uri), network=Poisoned())
    monkeypatch.setattr("diffusion_core.generation.worker.load_bundle", lambda uri, device: poisoned)
    with pytest.raises(NonFiniteImages, match="image 3"):
        Generator(load_bundle(bundle_uri), settings(guide_uri)).images(np.arange(8), BALANCED)


def test_a_guide_that_does_not_fit_is_told_before_anything_starts(tmp_path, bundle_uri, guide_uri, unconditional_uri):
    model = read_bundle_config(bundle_uri)

    def check(guide, **changes):
        changed = model.model_copy(update=changes)
        shape, names = changed.image_shape, changed.class_names
        guidance = GuidanceConfig(scale=2, guide=guide)
        check_guidance("generation.guidance", guidance, changed.process, shape, names, str(tmp_path))

    check(None)
    check(guide_uri)
    check(tiny_bundle(tmp_path / "free", class_names=()))
    for guide, changes, said in (
        (
            unconditional_uri,
            {},
            r"guidance\.guide: that model makes images of 4x8x3, and the one that it guides of 8x8x1",
        ),
        (guide_uri, {"class_names": ("a", "b")}, "has other classes"),
        (
            guide_uri,
            {"process": model.process.model_copy(update={"timesteps": 50})},
            r"process\.timesteps = 1000, and the one that it guides has 50",
        ),
        (str(tmp_path / "nowhere"), {}, "is not a model bundle"),
    ):
        with pytest.raises(UserError, match=said):
            check(guide, **changes)
    with pytest.raises(UserError, match=r"generation\.guidance\.guide: that model makes images of 4x8x3"):
        plan(tmp_path, bundle_uri, settings(unconditional_uri))
