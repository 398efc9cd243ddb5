"""The classifier of noisy images, and guidance by its gradient: Bayes' rule, and the whole way through a run."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_core.bundle import bundle_digest, load_bundle, model_card, read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.diffusion import (
    Denoiser,
    GaussianProcess,
    GuidanceConfig,
    ProcessConfig,
    SamplerConfig,
    make_schedule,
)
from diffusion_core.diffusion.denoiser import label_gradient
from diffusion_core.generation import GenerationConfig
from diffusion_core.generation.imageset import describe, open_imageset
from diffusion_core.generation.plan import ShardTask
from diffusion_core.generation.worker import Generator, ShardWorker
from diffusion_core.networks import NoisyClassifier, NoisyClassifierConfig, UNet, build_network
from diffusion_core.stages import checks, pipeline
from diffusion_core.stages.settings import load_config
from diffusion_core.training import open_run, posthoc, train
from diffusion_core.training.preview import noisy_images
from tests.toy_training import StopAt, assert_same_weights, losses, toy_dataset, toy_network, toy_spec

TINY = NoisyClassifierConfig(
    base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1, attention_resolutions=(4,)
)
MEANS = torch.tensor([-1.0, 0.3, 0.9], dtype=torch.float64)  # of every pixel, by class
SPREAD = 0.4
LABELS = torch.tensor([0, 1, 2, 2])


class Mixture:
    """Classes that are Gaussians, noised by a schedule: everything about them is known."""

    def __init__(self, kind: str) -> None:
        self.process = GaussianProcess(make_schedule(kind), "x0")

    def at(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.process.schedule.alpha(t), self.process.schedule.sigma(t)
        return alpha, sigma, alpha**2 * SPREAD**2 + sigma**2

    def by_class(self, x_t: Tensor, t: float, means: Tensor) -> Tensor:
        """E[x0 | x_t, class]."""
        alpha, _, variance = self.at(t)
        return means + alpha * SPREAD**2 / variance * (x_t - alpha * means)

    def logits(self, x_t: Tensor, t: float) -> Tensor:
        """log q(x_t | class), which is log p(class | x_t) up to a constant."""
        alpha, _, variance = self.at(t)
        distances = (x_t[:, None] - alpha * MEANS[None, :, None, None, None]).square().flatten(2).sum(dim=2)
        return -0.5 * distances / variance

    def unconditional(self, x_t: Tensor, t: float) -> Tensor:
        """E[x0 | x_t]."""
        shares = torch.softmax(self.logits(x_t, t), dim=1)
        each = torch.stack([self.by_class(x_t, t, mean) for mean in MEANS], dim=1)
        return (shares[:, :, None, None, None] * each).sum(dim=1)


@pytest.mark.parametrize("kind", ["linear", "cosine", "vp", "ve", "edm", "flow"])
def test_with_the_true_classifier_it_is_bayes_rule(kind: str) -> None:
    """grad log q(x|y) = grad log q(x) + grad log p(y|x): the model without labels becomes the one with them."""
    mixture = Mixture(kind)
    schedule = mixture.process.schedule
    for share in (0.1, 0.4, 0.8):
        t = round(share * schedule.t_max) if schedule.t_max > 900 else share * schedule.t_max
        noise = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x_t = mixture.process.q_sample(MEANS[LABELS][:, None, None, None].expand(4, 1, 2, 2), t, noise)

        def network(x: Tensor, time: Tensor, /, label: Tensor, t: float = t) -> Tensor:
            return mixture.unconditional(x / _input_scale(schedule, t), t)

        guidance = GuidanceConfig(classifier="it", classifier_scale=1.0)
        denoiser = Denoiser(
            mixture.process, network, {"label": LABELS}, guidance, classifier=lambda x, _, t=t: mixture.logits(x, t)
        )
        expected = mixture.by_class(x_t, t, MEANS[LABELS][:, None, None, None])
        torch.testing.assert_close(denoiser(x_t, t), expected, rtol=1e-8, atol=1e-8)


def _input_scale(schedule, t: float) -> float:
    scale = schedule.network_scale(t)
    return 1.0 if scale is None else float(scale)


def test_in_terms_of_the_noise_it_is_the_published_formula() -> None:
    """Dhariwal & Nichol 2021, algorithm 2: epsilon - sqrt(1 - alphas_cumprod) * s * grad, with their sign."""
    mixture, t, s = Mixture("cosine"), 300, 2.5
    x_t = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    epsilon = 0.3 * x_t
    process = GaussianProcess(mixture.process.schedule, "epsilon")
    got = Denoiser(
        process,
        lambda x, time, /, label: epsilon,
        {"label": LABELS},
        GuidanceConfig(classifier="it", classifier_scale=s),
        classifier=lambda x, _: mixture.logits(x, t),
    )(x_t, t)
    gradient = label_gradient(lambda x, _: mixture.logits(x, t), x_t, t, LABELS)
    moved = epsilon - torch.sqrt(1 - process.schedule.alphas_cumprod[t]) * s * gradient
    torch.testing.assert_close(got, process.predict_x0(x_t, t, moved))
    step = 1e-6 * torch.randn(x_t.shape, dtype=torch.float64)

    def log_p(x: Tensor) -> Tensor:
        return torch.log_softmax(mixture.logits(x, t), dim=1)[torch.arange(4), LABELS]

    slope = (log_p(x_t + step) - log_p(x_t - step)) / 2
    torch.testing.assert_close((gradient * step).flatten(1).sum(dim=1), slope, rtol=1e-5, atol=1e-12)


def test_it_has_the_interval_of_guidance_and_rests_in_pure_noise() -> None:
    mixture = Mixture("flow")
    schedule = mixture.process.schedule
    guidance = GuidanceConfig(
        classifier="it",
        classifier_scale=3.0,
        min_log_snr=float(schedule.log_snr(0.7)),
        max_log_snr=float(schedule.log_snr(0.3)),
    )
    x_t = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def guided(t, guidance: GuidanceConfig) -> Tensor:
        def classifier(x: Tensor, time: object) -> Tensor:
            return x.flatten(1)[:, :3]

        return Denoiser(
            mixture.process, lambda x, time, /, label: 0 * x, {"label": LABELS}, guidance, classifier=classifier
        )(x_t, t)

    assert torch.equal(guided(0.8, guidance), 0 * x_t) and torch.equal(guided(0.2, guidance), 0 * x_t)
    inside = guided(0.5, guidance)
    assert bool(inside.abs().max() > 0)
    mixed = guided(torch.tensor([0.8, 0.5, 0.2, 0.5], dtype=torch.float64), guidance)
    torch.testing.assert_close(mixed, inside * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None, None])
    assert torch.equal(guided(1.0, GuidanceConfig(classifier="it", classifier_scale=3.0)), 0 * x_t)


def awake(network: NoisyClassifier) -> NoisyClassifier:
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


def test_it_is_the_way_down_of_the_unet_and_starts_undecided() -> None:
    network = build_network(TINY, (8, 8, 1), 3)
    assert isinstance(network, NoisyClassifier)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 999])
    assert torch.equal(network(x, t), torch.zeros(2, 3))
    unet = build_network(toy_network(), (8, 8, 1), 0)
    assert isinstance(unet, UNet)
    shared = set(network.state_dict()) - {"norm_out.weight", "norm_out.bias", "out.weight", "out.bias"}
    assert shared < set(unet.state_dict()) and all(not name.startswith("up") for name in shared)
    logits = awake(network)(x, t)
    torch.testing.assert_close(network(x[1:], t[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(x, torch.tensor([3, 5])), logits)
    with pytest.raises(UserError, match="needs images of two classes"):
        build_network(TINY, (8, 8, 1), 1)


def test_the_gradient_is_taken_within_inference_mode_too() -> None:
    torch.manual_seed(0)
    network, process = awake(build_network(TINY, (8, 8, 1), 3)), GaussianProcess(make_schedule("vp"))
    x_t, label = torch.randn(4, 1, 8, 8), LABELS
    classifier = lambda x, t: network(*process.network_inputs(x, t))  # noqa: E731
    expected = label_gradient(classifier, x_t, 0.5, label)
    assert expected.shape == x_t.shape and bool(expected.abs().max() > 0)
    with torch.inference_mode():
        made = x_t + 0.0
        for t in (0.5, torch.full((4,), 0.5, dtype=torch.float64)):
            torch.testing.assert_close(label_gradient(classifier, made, t, label + 0), expected)


@pytest.mark.parametrize(
    ("cond", "classifier"), [({"label": LABELS}, None), (None, lambda x, t: x), ({}, lambda x, t: x)]
)
def test_it_needs_a_classifier_and_labels(cond, classifier) -> None:
    with pytest.raises(UserError, match=r"guidance\.classifier_scale: 2\.0 needs a classifier"):
        process = GaussianProcess(make_schedule("cosine"))
        Denoiser(
            process, lambda x, t: x, cond, GuidanceConfig(classifier="it", classifier_scale=2), classifier=classifier
        )


def test_a_scale_without_a_classifier_is_refused_before() -> None:
    with pytest.raises(UserError, match=r"generation\.guidance: classifier_scale is 2, which needs a classifier"):
        load_config("digits", settings=["generation.guidance.classifier_scale=2"])


# The whole way.

FEW = {"batch_size": 20, "microbatch_size": 20, "learning_rate": 5e-3, "ema_halflife_images": 100}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def dataset(store):
    return toy_dataset(store)


@pytest.fixture(scope="module")
def classifier_run(store, dataset):
    spec = toy_spec(dataset, TINY, images=600, checkpoint_every_images=200, ema="power", **FEW)
    run = open_run(store, spec)
    train(spec, run)
    return run


@pytest.fixture(scope="module")
def classifier_uri(classifier_run):
    return classifier_run.bundle(600).uri


@pytest.fixture(scope="module")
def model_uri(store, dataset):
    spec = toy_spec(dataset, toy_network(), images=800, **FEW)
    spec = spec.model_copy(update={"process": ProcessConfig(prediction="v")})
    run = open_run(store, spec)
    train(spec, run)
    return run.bundle(800).uri


def test_a_run_learns_the_classes_from_noisy_images(classifier_run, dataset, tmp_path):
    recorded = list(losses(classifier_run).values())
    assert recorded[0] == pytest.approx(math.log(3), abs=0.2) and recorded[-1] < 0.75 * math.log(3), recorded
    bundle = load_bundle(classifier_run.bundle(600).uri)
    assert isinstance(bundle.network, NoisyClassifier) and bundle.config.num_classes == 3
    card = model_card(bundle.config)
    assert "# A classifier of toy\n\nClassifies noisy images of 8x8" in card and "of noisy images, 8 base" in card
    x0 = torch.tensor([30.0, 120.0, 210.0])[:, None, None, None].expand(3, 1, 8, 8) / 127.5 - 1
    x_t = bundle.process.q_sample(x0, 100, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)))
    assert bundle.network(*bundle.process.network_inputs(x_t, 100)).argmax(dim=1).tolist() == [0, 1, 2]
    spec = toy_spec(
        dataset, TINY, images=600, checkpoint_every_images=200, ema="power", ema_snapshot_every_images=60, **FEW
    )
    again = open_run(str(tmp_path), spec)
    stop = StopAt(240, "interrupted")
    train(spec, again, progress=stop, should_stop=stop)
    train(spec, again)
    assert_same_weights(again, classifier_run)
    assert isinstance(load_bundle(posthoc.export(again, 0.15)).network, NoisyClassifier)


@pytest.mark.parametrize("kind", ["cosine", "edm", "flow", "vp", "ve"])
def test_its_picture_gets_noisier_image_by_image(kind):
    """By what is left of a pattern: its correlation with each image, whatever that was scaled by to fit."""
    pattern = 255 * np.random.default_rng(0).integers(0, 2, (40, 40, 1), np.uint8)
    picture = noisy_images(GaussianProcess(make_schedule(kind), "x0"), np.stack([pattern] * 6), seed=0)
    row = np.asarray(Image.open(io.BytesIO(picture)), np.float64)[:40]
    cells = [row[:, 41 * index : 41 * index + 40] for index in range(6)]
    left = np.array([np.corrcoef(cell.flatten(), pattern.flatten())[0, 1] for cell in cells])
    assert left[0] > left[-1] + 0.2 and (np.diff(left) < 0.05).all(), left


def test_it_steers_a_model_that_is_not_told_the_label(model_uri, classifier_uri):
    """Three brightnesses, 90 apart. What the model predicts, here v, does not matter to a classifier."""
    bundle = load_bundle(model_uri)

    def means(**guidance) -> list[float]:
        config = GenerationConfig(sampler=SamplerConfig(steps=10), guidance={"scale": 0.0, **guidance}, batch_size=30)
        images = Generator(bundle, config).images(np.arange(30), np.arange(30) % 3)
        return [float(images[label::3].mean()) for label in range(3)]

    free, steered = means(), means(classifier=classifier_uri, classifier_scale=10.0)
    assert max(free) - min(free) < 50
    assert steered[0] + 30 < steered[1] < steered[2] - 30, steered
    assert means(classifier=classifier_uri) == free, "a scale of 0 is neutral"


def test_its_digest_is_part_of_the_set(tmp_path, model_uri, classifier_uri):
    def plan(**guidance):
        config = GenerationConfig(
            sampler={"steps": 2}, guidance=guidance, batch_size=4, images_per_shard=4, count=4, first_image_id=0
        )
        bundle = read_bundle_config(model_uri)
        return describe(str(tmp_path), model_uri, bundle_digest(model_uri), bundle, config)

    images = plan(classifier=classifier_uri, classifier_scale=1.5)
    shard = images.missing(images.extend(0, 4))[0]
    row = {"shard": shard.number, "first_image_id": 0, "count": 4}
    assert ShardWorker(ShardTask(images.uri, model_uri, "toy/1"))(row)["outcome"] == "made"
    assert open_imageset(images.uri).description.guides["classifier"]["digest"] == bundle_digest(classifier_uri)
    ids = {images.description.set_id, plan().description.set_id}
    ids.add(plan(classifier=classifier_uri, classifier_scale=2.0).description.set_id)
    assert len(ids) == 3
    assert plan(classifier=classifier_uri).description.set_id == plan().description.set_id


def test_a_classifier_is_no_model_of_images(store, model_uri, classifier_uri, tmp_path):
    model, classifier = read_bundle_config(model_uri), read_bundle_config(classifier_uri)
    with pytest.raises(UserError, match="is a classifier of noisy images: it makes none"):
        describe(store, classifier_uri, bundle_digest(classifier_uri), classifier, GenerationConfig())

    def check(process=model.process, classes=model.class_names, **guidance):
        config = GuidanceConfig(**guidance)
        checks.check_guidance("generation.guidance", config, process, model.image_shape, classes, store)

    check(classifier=classifier_uri, classifier_scale=1.0)
    for fields, said in (
        ({"classifier": model_uri, "classifier_scale": 1.0}, r"guidance\.classifier: .* no classifier .* kind unet"),
        (
            {"guide": classifier_uri, "scale": 2.0},
            r"guidance\.guide: .* no model of images, but of the kind classifier",
        ),
        ({"classifier": classifier_uri, "classifier_scale": 1.0, "classes": ("a", "b", "c")}, "has other classes"),
        (
            {"classifier": classifier_uri, "classifier_scale": 1.0, "classes": ()},
            "leads to a class, .* has none",
        ),
        ({"scale": 2.0, "classes": ()}, r"generation\.guidance\.scale: 2 is not accepted for a model without classes"),
        (
            {"classifier": classifier_uri, "classifier_scale": 1.0, "process": ProcessConfig(timesteps=10)},
            r"process\.timesteps = 1000",
        ),
    ):
        with pytest.raises(UserError, match=said):
            check(**fields)
    unlabelled = toy_dataset(str(tmp_path), conditional=False)
    with pytest.raises(UserError, match=r"network\.kind: classifier needs a dataset with two classes"):
        open_run(str(tmp_path), toy_spec(unlabelled, TINY))
    weighted = toy_spec(toy_dataset(str(tmp_path)), TINY, objective={"weighting": "min_snr"})
    with pytest.raises(UserError, match=r"training\.objective is not for the network\.kind classifier"):
        open_run(str(tmp_path), weighted)
    with pytest.raises(UserError, match="train it alone, with diffusion train"):
        pipeline.check(load_config("digits", settings=["network.kind=classifier", f"store={tmp_path}"]))
