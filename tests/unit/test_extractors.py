"""The feature extractors: the classifier that a dataset trains for itself, and FID's InceptionV3."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusion_core.config import UserError
from diffusion_core.data.shards import Batch, write_dataset
from diffusion_core.evaluation import classifier, inception
from diffusion_core.evaluation.classifier import Classifier, classifier_extractor
from diffusion_core.evaluation.config import ClassifierConfig, EvaluationConfig
from diffusion_core.evaluation.distances import GaussianStatistics, frechet_distance
from diffusion_core.evaluation.features import Features, Measurer, load_reference
from diffusion_core.evaluation.identity import extractor_identity

SMALL = ClassifierConfig(width=8, features=16, images=4000, batch_size=32)


def stripes(count, size=10, channels=1, seed=0):
    """Images of two classes: a bright upper half, a bright left half, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size=count)
    images = rng.normal(90, 25, size=(count, size, size, channels))
    images[labels == 0, : size // 2] += 60
    images[labels == 1, :, : size // 2] += 60
    return Batch(np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.int64))


def dataset(store, labelled=True, **shape):
    splits = {"train": stripes(300, **shape), "test": stripes(100, seed=1, **shape)}
    if not labelled:
        splits = {split: Batch(batch.images) for split, batch in splits.items()}
    return write_dataset(store, "stripes", splits, ["upper", "left"] if labelled else [], rows_per_shard=80)


def test_the_classifier_learns_the_classes_and_is_kept_with_the_dataset(tmp_path, monkeypatch):
    data = dataset(tmp_path)
    extractor = classifier_extractor(data, SMALL)
    test = data.read("test")
    assert (extractor.classify(test.images) == test.labels).mean() > 0.97
    assert extractor.knows_classes and extractor.features(test.images).shape == (100, 16)
    monkeypatch.setattr(classifier, "_train", lambda *_: pytest.fail("trained again"))
    again = classifier_extractor(data, SMALL)
    np.testing.assert_array_equal(again.features(test.images), extractor.features(test.images))
    assert again.digest == extractor.digest == extractor_identity(EvaluationConfig(classifier=SMALL), data.version)


def test_training_is_reproducible_and_leaves_the_callers_randomness_and_threads_alone(tmp_path):
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    config = SMALL.model_copy(update={"images": 640, "threads": 2})
    first = classifier_extractor(dataset(tmp_path / "a"), config)
    second = classifier_extractor(dataset(tmp_path / "b"), config)
    images = stripes(20).images
    np.testing.assert_array_equal(first.features(images), second.features(images))
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert first.digest != extractor_identity(EvaluationConfig(classifier=SMALL), dataset(tmp_path / "a").version)


def test_features_do_not_depend_on_what_else_is_measured(tmp_path):
    extractor = classifier_extractor(dataset(tmp_path), SMALL.model_copy(update={"images": 320}))
    images = stripes(300).images
    whole = extractor.features(images)
    np.testing.assert_array_equal(whole[250:253], np.concatenate([extractor.features(images[250:253])]))


def test_without_labels_rotations_are_learned_and_the_features_tell_sets_apart(tmp_path):
    data = dataset(tmp_path, labelled=False)
    extractor = classifier_extractor(data, SMALL)
    assert not extractor.knows_classes
    real = GaussianStatistics.of(extractor.features(data.read("train").images))
    held_out = GaussianStatistics.of(extractor.features(data.read("test").images))
    noise = np.random.default_rng(0).integers(0, 256, size=(100, 10, 10, 1)).astype(np.uint8)
    assert frechet_distance(real, GaussianStatistics.of(extractor.features(noise))) > 5 * frechet_distance(
        real, held_out
    )


def test_rotation_labels_say_how_the_image_was_turned():
    images = torch.arange(2 * 9.0).view(2, 1, 3, 3).repeat(40, 1, 1, 1)
    turned, turns = classifier._rotated(images, np.random.default_rng(0))
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for before, after, turn in zip(images, turned, turns, strict=True):
        assert torch.equal(after, torch.rot90(before, int(turn), dims=(1, 2)))
    flat, turns = classifier._rotated(torch.arange(6.0).view(1, 1, 2, 3).repeat(20, 1, 1, 1), np.random.default_rng(0))
    assert set(turns.tolist()) == {0, 1} and flat.shape == (20, 1, 2, 3)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 48, 3), (96, 64, 3), (9, 200, 4)])
def test_any_image_size_and_channel_count_from_8x8_up_is_taken(shape):
    model = Classifier(shape, outputs=3, width=8, features=16).eval()
    images = np.zeros((2, *shape), np.uint8)
    logits, features = model(classifier._network_input(classifier.shrink(images)))
    assert logits.shape == (2, 3) and features.shape == (2, 16)


def test_large_images_are_averaged_down():
    images = np.random.default_rng(0).integers(0, 256, size=(3, 128, 256, 3)).astype(np.uint8)
    small = classifier.shrink(images)
    assert small.shape == (3, 64, 128, 3)
    np.testing.assert_allclose(small, images.reshape(3, 64, 2, 128, 2, 3).mean(axis=(2, 4)), atol=0.51)


def test_images_below_8x8_and_a_damaged_cache_give_one_sentence(tmp_path):
    with pytest.raises(UserError, match="at least 8x8"):
        classifier_extractor(dataset(tmp_path / "tiny", size=6), SMALL)
    data = dataset(tmp_path)
    config = SMALL.model_copy(update={"images": 64})
    extractor = classifier_extractor(data, config)
    place = data.directory / f"extractors/{extractor.digest}"
    place.write("model.safetensors", place.read("model.safetensors")[:-1] + b"\0")
    with pytest.raises(UserError, match="is damaged: delete that folder"):
        classifier_extractor(data, config)


def test_the_order_of_training_images_sees_all_equally_often():
    order = classifier._order(10, 4, np.random.default_rng(0))
    rows = np.concatenate([next(order) for _ in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


def test_the_reference_is_the_train_split_and_the_floor_the_test_split(tmp_path):
    data = dataset(tmp_path)
    measurer = Measurer(EvaluationConfig(classifier=SMALL, samples=60), data)
    reference = measurer.reference(60)
    assert reference.statistics.count == 300 and reference.train.shape == (60, 16)
    test = data.read("test", limit=60)
    np.testing.assert_array_equal(reference.held_out.values, measurer.extractor.features(test.images))
    np.testing.assert_array_equal(reference.held_out.asked, test.labels)
    expected = GaussianStatistics.of(measurer.extractor.features(data.read("train").images))
    np.testing.assert_allclose(reference.statistics.covariance, expected.covariance, rtol=1e-9, atol=1e-12)
    kept = load_reference(data, measurer.extractor.digest, 60)
    np.testing.assert_array_equal(kept.statistics.mean, reference.statistics.mean)
    with pytest.raises(UserError, match="are gone"):
        load_reference(data, measurer.extractor.digest, 61)


def test_features_survive_storage_and_know_their_accuracy():
    kept = Features(np.ones((4, 2), np.float32), np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))
    back = Features.from_bytes(kept.to_bytes())
    assert back.accuracy == 0.75
    np.testing.assert_array_equal(back.values, kept.values)
    assert Features.from_bytes(Features(kept.values).to_bytes()).accuracy is None


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return inception.FIDInceptionV3().state_dict()


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(weights, path)
    return path


def test_inception_has_the_names_shapes_and_size_of_the_published_weights(weights):
    known = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_1a_3x3.bn.running_var": (32,),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7_3.conv.weight": (192, 128, 7, 1),
        "Mixed_6d.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }
    for name, shape in known.items():
        assert tuple(weights[name].shape) == shape, name
    parameters = {name: value for name, value in weights.items() if "running" not in name and "num_batches" not in name}
    # torchvision's InceptionV3 without auxiliary outputs has 23,834,568 parameters with 1,000 classes.
    assert sum(value.numel() for value in parameters.values()) == 23_834_568 + 8 * 2049


def test_average_pools_do_not_count_the_padding_and_the_last_block_takes_the_maximum():
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(inception.average(ones), ones)
    blocks = inception.FIDInceptionV3()
    assert not blocks.Mixed_7b.maximum and blocks.Mixed_7c.maximum
    assert blocks.Conv2d_1a_3x3.bn.eps == 0.001
    x = torch.randn(1, 1280, 3, 3)
    block = inception.BlockE(1280, maximum=True).eval()
    with torch.no_grad():
        pooled = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, stride=1)
        assert torch.allclose(block(x)[:, -192:], block.branch_pool(pooled), atol=1e-5)


def test_inception_features_are_of_bilinearly_resized_images_scaled_to_one(weights_file, weights):
    extractor = inception.InceptionExtractor(str(weights_file))
    images = np.random.default_rng(0).integers(0, 256, size=(2, 16, 16, 3)).astype(np.uint8)
    found = extractor.features(images)
    model = inception.FIDInceptionV3().eval()
    model.load_state_dict(weights)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-3, atol=1e-5)
    assert found.shape == (2, 2048) and found.dtype == np.float32
    grey = extractor.features(images[..., :1])
    np.testing.assert_allclose(grey, extractor.features(images[..., :1].repeat(3, axis=-1)), rtol=1e-4, atol=1e-6)


def test_inception_weights_come_from_safetensors_or_plain_torch_files_and_nothing_that_executes(
    tmp_path, weights, weights_file
):
    published = {name: value for name, value in weights.items() if "num_batches_tracked" not in name}
    torch.save(published, tmp_path / "weights.pth")
    assert inception.InceptionExtractor(str(tmp_path / "weights.pth")).digest
    config = EvaluationConfig(extractor="inception", inception_weights=str(weights_file))
    assert extractor_identity(config, "v") == inception.InceptionExtractor(str(weights_file)).digest

    class Dangerous:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"x": Dangerous()}, tmp_path / "danger.pth")
    for name, content, said in [
        ("danger.pth", None, "neither safetensors nor plain torch weights"),
        ("text.pth", b"hello", "neither safetensors nor plain torch weights"),
        ("text.safetensors", b"hello", "not a safetensors file"),
        ("missing.pth", None, "does not exist"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            inception.InceptionExtractor(str(tmp_path / name))
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights of FID's InceptionV3"):
        inception.InceptionExtractor(str(tmp_path / "other.pth"))
