"""An image is a function of bundle, configuration and image id, whatever it was asked for together with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from diffusion_core.bundle import load_bundle
from diffusion_core.diffusion import KeyedNoise
from diffusion_core.generation import GenerationConfig
from diffusion_core.generation.imageset import ImageSet
from diffusion_core.generation.labels import Labels
from diffusion_core.generation.plan import Shard, ShardTask
from diffusion_core.generation.worker import Generator, NonFiniteImages, ShardWorker
from diffusion_core.stages.work import generate
from diffusion_core.store import Directory
from diffusion_core.store.patience import StoreUnavailable

BALANCED = Labels(10).of


def make_generator(uri, **fields):
    fields = {"batch_size": 8, "sampler": {"steps": 3}, "guidance": {"scale": 2.0}} | fields
    return Generator(load_bundle(uri), GenerationConfig(**fields))


@pytest.fixture(scope="module")
def generator(bundle_uri):
    return make_generator(bundle_uri)


@pytest.fixture(scope="module")
def images(generator):
    return generator.images(np.arange(40), BALANCED)


def test_images_are_pixels_and_differ(images):
    assert images.shape == (40, 8, 8, 1)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40


@pytest.mark.parametrize(
    "ids",
    [[0], [7], [8], [39], range(3, 21), [33, 2, 17, 2, 2, 33], range(39, -1, -1), []],
    ids=["first", "end of a batch", "start of one", "last", "across batches", "repeated", "backwards", "none"],
)
def test_any_selection_of_ids_gives_the_same_pixels(generator, images, ids):
    np.testing.assert_array_equal(generator.images(np.array(list(ids), dtype=np.int64), BALANCED), images[list(ids)])


@pytest.mark.parametrize("sampler", [{"kind": "ddpm", "steps": 4}, {"kind": "ddim", "steps": 3, "eta": 1.0}])
def test_the_noise_of_each_step_belongs_to_the_image(bundle_uri, sampler):
    generator = make_generator(bundle_uri, sampler=sampler)
    whole = generator.images(np.arange(20), BALANCED)
    np.testing.assert_array_equal(generator.images(np.array([13]), BALANCED)[0], whole[13])
    other = make_generator(bundle_uri, sampler=sampler, seed=1).images(np.array([13]), BALANCED)[0]
    assert not np.array_equal(other, whole[13])


def test_the_labels_of_neighbours_do_not_matter(generator, images):
    ids = np.array([4, 12, 5])
    np.testing.assert_array_equal(generator.images(ids, np.array([4, 2, 5])), images[ids])


def test_the_label_matters(generator, images):
    assert not np.array_equal(generator.images(np.array([4]), np.array([5]))[0], images[4])


def test_one_id_with_several_labels(generator):
    got = generator.images(np.array([4, 4, 5]), np.array([1, 2, 1]))
    for n, (image_id, label) in enumerate([(4, 1), (4, 2), (5, 1)]):
        np.testing.assert_array_equal(got[n], generator.images(np.array([image_id]), np.array([label]))[0])


def test_guidance_and_seed_are_part_of_the_image(bundle_uri, images):
    for fields in ({"guidance": {"scale": 1.0}}, {"seed": 5}, {"sampler": {"steps": 4}}):
        assert not np.array_equal(make_generator(bundle_uri, **fields).images(np.arange(4), BALANCED), images[:4])


def test_very_high_ids(generator):
    ids = np.array([2**61 + 1, 1], dtype=np.int64)
    high, low = generator.images(ids, BALANCED)
    assert not np.array_equal(high, low)
    np.testing.assert_array_equal(high, generator.images(ids[:1], BALANCED)[0])


def test_an_unconditional_model_of_colour_images_that_are_not_square(unconditional_uri):
    generator = make_generator(unconditional_uri, guidance={"scale": 1.0})
    images = generator.images(np.arange(10), None)
    assert images.shape == (10, 4, 8, 3)
    np.testing.assert_array_equal(generator.images(np.arange(9, 10), Labels(0).of), images[9:])


def test_bfloat16_gives_the_bits_of_autocast_and_leaves_the_weights_of_the_bundle_alone(bundle_uri):
    bundle = load_bundle(bundle_uri)
    generator = Generator(bundle, GenerationConfig(batch_size=8, precision="bfloat16"))
    generator._network.watch(8)
    x_t, t, label = torch.randn(8, 1, 8, 8), torch.full((8,), 500.0), torch.arange(8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = bundle.network(x_t, t, label).float()
    with torch.inference_mode():
        assert torch.equal(generator._network(x_t, t, label), expected)
    assert generator._network.network.conv_in.weight.dtype is torch.bfloat16, "rounded once, not at every call"
    assert all(weight.dtype is torch.float32 for weight in bundle.network.parameters())


def test_bfloat16_is_close_and_deterministic(bundle_uri):
    exact = make_generator(bundle_uri, sampler={"steps": 1}).images(np.arange(8), BALANCED).astype(int)
    rough = make_generator(bundle_uri, precision="bfloat16", sampler={"steps": 1})
    first, second = (rough.images(np.arange(8), BALANCED) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.mean(np.abs(first - exact)) < 8
    assert not np.array_equal(first, exact)


class Recorded(torch.nn.Module):
    """Keeps what the network was asked."""

    def __init__(self, network):
        super().__init__()
        self.network, self.null_label, self.asked = network, network.null_label, []

    def forward(self, x_t, t, label):
        self.asked.append((x_t.clone(), label.clone()))
        return self.network(x_t, t, label)


@pytest.mark.parametrize("ids", [[13], [15, 9], list(range(8, 16))])
def test_an_image_has_its_place_in_an_aligned_batch_of_fixed_size(bundle_uri, ids):
    bundle = load_bundle(bundle_uri)
    network = Recorded(bundle.network)
    config = GenerationConfig(batch_size=8, sampler={"steps": 3})
    Generator(dataclasses.replace(bundle, network=network), config).images(np.array(ids), BALANCED)
    assert [x_t.shape for x_t, _ in network.asked] == [(8, 1, 8, 8)] * 3
    torch.testing.assert_close(network.asked[0][0], KeyedNoise(0, range(8, 16)).initial((1, 8, 8)), rtol=0, atol=0)
    assert network.asked[0][1].tolist() == [8, 9, 0, 1, 2, 3, 4, 5]


class Poisoned(torch.nn.Module):
    """Gives a non-finite value for one label."""

    def __init__(self, network, label, value):
        super().__init__()
        self.network, self.label, self.value = network, label, value
        self.null_label = network.null_label

    def forward(self, x_t, t, label):
        out = self.network(x_t, t, label)
        out[label == self.label, 0, 0, 0] = self.value
        return out


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("threshold", ["static", "none"])
def test_a_non_finite_value_is_an_error_and_no_pixel(bundle_uri, value, threshold):
    bundle = load_bundle(bundle_uri)
    bundle = dataclasses.replace(bundle, network=Poisoned(bundle.network, 3, value))
    fields = {"sampler": {"steps": 3, "threshold": threshold}, "guidance": {"scale": 2.0}, "batch_size": 16}
    generator = Generator(bundle, GenerationConfig(**fields))
    with pytest.raises(NonFiniteImages, match=r"image 3, 13$"):
        generator.images(np.array([13, 4, 3]), BALANCED)
    generator.images(np.array([4, 5]), BALANCED)  # a poisoned neighbour does not matter


def test_shards_that_failed_as_the_store_was_away_do_not_make_it_a_mistake_of_the_user(tmp_path):
    class Unlucky(ShardWorker):
        def make(self, shard: Shard) -> str:
            raise StoreUnavailable("The store s3://b cannot be reached: no answer.")

    row = Unlucky(ShardTask("set", "bundle", "v"))({"shard": 3, "first_image_id": 24, "count": 8})
    assert (row["outcome"], row["store_away"], row["final"]) == ("failed", True, False)
    outcome = generate._Outcome(failed={Shard(3, 24, 8): {**row, "attempts": 3}})
    images = ImageSet(Directory(tmp_path), None)
    with pytest.raises(StoreUnavailable, match=r"1 of 1 shards failed, .* cannot be reached: no answer\. All of them"):
        generate._report_failures(images, list(outcome.failed), outcome, allowed=5)
