"""The loop of one process: it continues bit-equal from anywhere, ends where it should, and says what went wrong."""

from __future__ import annotations

import io
import itertools
import json
import math
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_core.bundle import load_bundle
from diffusion_core.config import UserError
from diffusion_core.diffusion.config import ProcessConfig, SamplerConfig
from diffusion_core.diffusion.kinds import Variance
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.worker import Generator
from diffusion_core.training import loop as loop_module
from diffusion_core.training import open_run, train
from diffusion_core.training.checkpoint import checkpoints
from diffusion_core.training.loop import LOST, LeaseLostError
from diffusion_core.training.run import INTERRUPTED
from tests.toy_training import (
    StopAt,
    assert_same_weights,
    losses,
    toy_dataset,
    toy_network,
    toy_request,
    toy_spec,
    weights,
)


class CrashError(Exception):
    pass


def crash_after(steps):
    """A `should_stop` that dies like a killed process: nothing is saved after it."""
    count = itertools.count(1)

    def should_stop():
        if next(count) > steps:
            raise CrashError
        return None

    return should_stop


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """A run of 200 images (two epochs) that nothing disturbed."""
    spec = toy_spec(dataset)
    run = open_run(str(tmp_path_factory.mktemp("straight")), spec)
    return run, train(spec, run)


@pytest.mark.parametrize(
    ("process", "objective", "kind"),
    [
        ({"schedule": "edm", "prediction": "edm"}, {"time_mean": -0.4, "time_std": 1.0}, "dpmpp_2m"),
        ({"schedule": "flow", "prediction": "flow"}, {"times": "logit_normal"}, "dpmpp_2m"),
        ({"prediction": "v", "rescale_zero_terminal_snr": True}, {"weighting": "min_snr"}, "dpmpp_2m"),
        ({"variance": "learned_range"}, {"loss": "hybrid"}, "ddpm"),
        (
            {"variance": "learned_range", "prediction": "v"},
            {"loss": "vlb", "times": "importance", "importance": (8, 4, 2, 1)},
            "ddpm",
        ),
    ],
)
def test_every_kind_of_process_and_objective_is_trained_exported_and_sampled(
    process, objective, kind, dataset, tmp_path
):
    spec = toy_spec(dataset, images=800, ema_halflife_images=100, learning_rate=5e-3, objective=objective)
    spec = spec.model_copy(update={"process": ProcessConfig.model_validate(process)})
    run = open_run(str(tmp_path), spec)
    outcome = train(spec, run)
    bundle = load_bundle(run.bundle(outcome.images_seen).uri)
    assert bundle.config.process == spec.process
    assert (bundle.network.conv_out.bias != 0).all(), "zero at first: every channel has learned, the variance's too"
    sampler = SamplerConfig.model_validate({"kind": kind, "steps": 10})
    generator = Generator(bundle, GenerationConfig(sampler=sampler, batch_size=30))
    images = generator.images(np.arange(30), np.arange(30) % 3)
    # The classes of the toy are three brightnesses, 90 apart.
    means = [images[label::3].mean() for label in range(3)]
    assert means[0] + 20 < means[1] < means[2] - 20, means


def test_a_run_ends_at_its_images_with_a_bundle(straight, dataset):
    run, outcome = straight
    assert (outcome.images_seen, outcome.stopped) == (200, "images")
    assert math.isfinite(outcome.loss) and outcome.images_per_second > 0 and outcome.seconds > 0
    bundle = load_bundle(run.bundle(200).uri)
    assert bundle.digest == outcome.bundle_digest
    assert bundle.config.run_id == run.run_id and bundle.config.images_seen == 200
    assert bundle.config.dataset.uri == dataset and len(bundle.config.class_names) == 3
    stored = weights(run)
    for name, tensor in bundle.network.state_dict().items():
        assert torch.equal(tensor, stored[f"ema/{name}"]), "the bundle holds the moving average"
    picture = Image.open(io.BytesIO(run.bundle(200).read("samples.png")))
    assert min(picture.size) >= 16


def test_the_loss_falls(store, dataset):
    spec = toy_spec(dataset, images=800, learning_rate=3e-3, log_every_images=200, checkpoint_every_images=10**6)
    run = open_run(store, spec)
    train(spec, run)
    recorded = list(losses(run).values())
    assert recorded[-1] < 0.7 * recorded[0], recorded


@pytest.mark.parametrize("crashes", [[1], [7], [12], [19], [3, 8, 2, 6]])
def test_continuing_after_a_crash_is_bit_equal(store, dataset, straight, crashes):
    """Steps are of 10 images, checkpoints at 50, 100 (the epoch's end) and 150."""
    spec = toy_spec(dataset)
    run = open_run(store, spec)
    for steps in crashes:
        with pytest.raises(CrashError):
            train(spec, run, should_stop=crash_after(steps))
    outcome = train(spec, run)
    assert outcome.images_seen == 200 and outcome.loss == straight[1].loss
    assert outcome.bundle_digest == straight[1].bundle_digest
    assert_same_weights(run, straight[0])
    assert losses(run) == losses(straight[0]), "recorded once each, with the same values"


def test_continuing_with_dropout_flips_bfloat16_and_a_learned_variance_is_bit_equal(store, tmp_path, dataset):
    objective = {"loss": "hybrid", "times": "importance", "importance": (3, 1)}
    changes = {"precision": "bfloat16", "horizontal_flip": True, "weight_decay": 0.1, "objective": objective}
    spec = toy_spec(dataset, toy_network(dropout=0.3), **changes)
    spec = spec.model_copy(update={"process": ProcessConfig(variance=Variance.LEARNED_RANGE)})
    whole, parts = open_run(str(tmp_path / "other"), spec), open_run(store, spec)
    train(spec, whole)
    with pytest.raises(CrashError):
        train(spec, parts, should_stop=crash_after(13))
    train(spec, parts)
    assert_same_weights(parts, whole)


def test_longer_training_continues_the_run(store, dataset, straight):
    short = toy_spec(dataset, images=110)
    run = open_run(store, short)
    assert train(short, run).images_seen == 110
    assert run.finished(short.training) is not None and run.finished(toy_spec(dataset).training) is None
    longer = toy_spec(dataset)
    assert open_run(store, longer) == run
    assert train(longer, run).images_seen == 200
    assert_same_weights(run, straight[0])
    assert run.finished(short.training).images_seen == 110, "the shorter one is still there"
    assert run.finished(toy_spec(dataset, images=150).training).images_seen == 200


def test_cadence_changes_no_number(store, dataset, straight):
    changes = {"checkpoint_every_images": 30, "log_every_images": 70, "preview_every_images": 20, "keep_checkpoints": 2}
    spec = toy_spec(dataset, **changes)
    run = open_run(store, spec)
    train(spec, run)
    assert_same_weights(run, straight[0])
    assert checkpoints(run.checkpoints) == [180, 200]
    assert len(list(run.directory.list("previews/preview-"))) == 9


def test_recorded_losses_are_means_over_every_step(store, dataset):
    spec = toy_spec(dataset, log_every_images=10, images=80, checkpoint_every_images=1000)
    run = open_run(store, spec)
    train(spec, run)
    single = losses(run)
    coarse = toy_spec(dataset, log_every_images=40, preview_every_images=20, images=80, checkpoint_every_images=1000)
    other = open_run(store + "-2", coarse)
    train(coarse, other)
    for seen, mean in losses(other).items():
        assert mean == pytest.approx(sum(single[seen - back] for back in (0, 10, 20, 30)) / 4, rel=1e-9)


def test_a_damaged_checkpoint_costs_only_the_way_back(store, dataset, straight):
    spec = toy_spec(dataset)
    run = open_run(store, spec)
    with pytest.raises(CrashError):
        train(spec, run, should_stop=crash_after(17))
    damaged = next(entry.key for entry in run.checkpoints.list("150/network"))
    path = run.checkpoints.local_path / damaged
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    train(spec, run)
    assert_same_weights(run, straight[0])


class ForgetfulRecorder:
    """Its service is away: what it is told is lost with the process, unless the run tells it again."""

    mlflow_run_id = ""

    def __init__(self):
        self.told = {}

    def log(self, images_seen, metrics):
        self.told.setdefault(images_seen, dict(metrics))

    def image(self, name, png):
        pass

    def unrecorded(self):
        return list(self.told.items())

    def checkpointing(self):
        pass

    def finish(self, status="FINISHED"):
        pass


def test_figures_that_were_not_recorded_yet_survive_a_crash_with_the_checkpoint(store, dataset):
    spec = toy_spec(dataset)
    first, second = ForgetfulRecorder(), ForgetfulRecorder()
    with pytest.raises(CrashError):
        train(spec, open_run(store, spec), recorder=first, should_stop=crash_after(13))
    train(spec, open_run(store, spec), recorder=second)
    assert sorted(second.told) == [40, 50, 80, 100, 120, 150, 160, 200]
    assert all(second.told[seen] == first.told[seen] for seen in (40, 50, 80, 100)), "the very same figures"


def test_an_interrupted_run_keeps_what_it_has(store, dataset, straight):
    spec = toy_spec(dataset)
    run = open_run(store, spec)
    stop = StopAt(70, INTERRUPTED)
    outcome = train(spec, run, progress=stop, should_stop=stop)
    assert (outcome.stopped, outcome.images_seen, outcome.bundle_digest) == (INTERRUPTED, 70, None)
    assert checkpoints(run.checkpoints)[-1] == 70 and run.finished(spec.training) is None
    train(spec, run)
    assert_same_weights(run, straight[0])


def test_who_lost_the_run_writes_nothing_more(store, dataset):
    spec = toy_spec(dataset)
    run = open_run(store, spec)
    stop = StopAt(70, LOST)
    with pytest.raises(LeaseLostError):
        train(spec, run, progress=stop, should_stop=stop)
    assert checkpoints(run.checkpoints) == [50]


def test_a_run_lost_just_before_a_checkpoint_does_not_write_it(store, dataset):
    spec = toy_spec(dataset)
    run = open_run(store, spec)
    asked = itertools.count(1)  # four steps ask once each; the fifth asks before it saves
    with pytest.raises(LeaseLostError):
        train(spec, run, should_stop=lambda: LOST if next(asked) >= 5 else None)
    assert checkpoints(run.checkpoints) == []


def test_a_run_lost_while_its_samples_are_drawn_exports_no_bundle(store, dataset, monkeypatch):
    spec = toy_spec(dataset)
    run = open_run(store, spec)
    lost = []
    draw = loop_module.preview

    def slow_preview(*arguments, **options):
        lost.append(LOST)
        return draw(*arguments, **options)

    monkeypatch.setattr(loop_module, "preview", slow_preview)
    with pytest.raises(LeaseLostError):
        train(spec, run, should_stop=lambda: lost[0] if lost else None)
    assert checkpoints(run.checkpoints)[-1] == 200 and not list(run.bundle(200).list())


def test_the_time_budget_counts_all_attempts(store, dataset, monkeypatch):
    """Each step takes one second by a clock that only steps move."""
    now = [0.0]
    take_step = loop_module.Learner.step

    def slow_step(self, *arguments):
        now[0] += 1.0
        return take_step(self, *arguments)

    monkeypatch.setattr(loop_module.Learner, "step", slow_step)
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: now[0])
    spec = toy_spec(dataset, time_budget_s=12, images=10**6)
    run = open_run(store, spec)
    with pytest.raises(CrashError):
        train(spec, run, should_stop=crash_after(6))
    outcome = train(spec, run)
    assert (outcome.stopped, outcome.images_seen, outcome.seconds) == ("time budget", 120, 12.0)
    assert run.finished(spec.training) == outcome
    again = train(spec, run)
    assert again.images_seen == 120, "nothing is left of the budget"
    more = toy_spec(dataset, time_budget_s=20, images=10**6)
    assert run.finished(more.training) is None
    assert train(more, run).images_seen == 200


def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_a_good_checkpoint(store, dataset):
    spec = toy_spec(dataset, images=10**5)
    run = open_run(store, spec)
    poison = itertools.count(1)
    take_step = loop_module.Learner.step

    def poisoned(self, *arguments):
        if next(poison) == 23:
            with torch.no_grad():
                next(self.network.parameters()).fill_(math.nan)
        return take_step(self, *arguments)

    loop_module.Learner.step = poisoned
    try:
        with pytest.raises(UserError, match=r"no longer finite after 230 images, at a learning rate of 0.001;"):
            train(spec, run)
    finally:
        loop_module.Learner.step = take_step
    assert checkpoints(run.checkpoints)[-1] == 200
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_an_absurd_rate_diverges_into_a_sentence(store, dataset):
    spec = toy_spec(dataset, learning_rate=1.0, weight_decay=10.0, grad_clip=None, warmup_images=0, images=20_000)
    with pytest.raises(UserError, match=r"training\.learning_rate: the "):
        train(spec, open_run(store, spec))


def test_unconditional_images(store):
    spec = toy_spec(toy_dataset(store, conditional=False), images=60)
    run = open_run(store, spec)
    with pytest.raises(CrashError):
        train(spec, run, should_stop=crash_after(5))
    assert train(spec, run).images_seen == 60
    assert load_bundle(run.bundle(60).uri).config.class_names == ()


def test_a_dataset_beyond_the_memory_budget_streams_the_same_batches(store, dataset, straight, monkeypatch):
    make = loop_module.Loader
    made = []

    def tight(*arguments, memory_budget_bytes):
        made.append(make(*arguments, memory_budget_bytes=100))
        return made[-1]

    monkeypatch.setattr(loop_module, "Loader", tight)
    spec = toy_spec(dataset)
    run = open_run(store, spec)
    train(spec, run)
    assert not made[0].in_memory
    assert_same_weights(run, straight[0])


def test_starting_from_a_bundle(store, dataset, straight):
    origin = straight[0].bundle(200).uri
    spec = toy_spec(dataset, init_from=origin, learning_rate=1e-9, images=20)
    run = open_run(store, spec)
    assert run.run_id != open_run(store, toy_spec(dataset, learning_rate=1e-9, images=20)).run_id
    train(spec, run, start=origin)
    theirs, ours = load_bundle(origin).network.state_dict(), weights(run)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[f"network/{name}"], tensor, rtol=0, atol=1e-6)


def test_the_program_without_ray_starts_from_the_bundle_too(store, dataset, straight, tmp_path, monkeypatch):
    from diffusion_core.training.__main__ import main

    origin = straight[0].bundle(200).uri
    spec = toy_spec(dataset, init_from=origin, learning_rate=1e-9, images=20)
    request = tmp_path / "request.json"
    request.write_text(json.dumps(toy_request(store, spec)))
    monkeypatch.setattr(sys, "argv", ["training", str(request)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    theirs, ours = load_bundle(origin).network.state_dict(), weights(open_run(store, spec))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[f"network/{name}"], tensor, rtol=0, atol=1e-6)


def test_starting_from_a_bundle_with_other_classes(store, straight):
    origin = straight[0].bundle(200).uri
    spec = toy_spec(toy_dataset(store, conditional=False), init_from=origin, learning_rate=1e-9, images=10)
    run = open_run(store, spec)
    train(spec, run, start=origin)
    theirs, ours = load_bundle(origin).network.state_dict(), weights(run)
    taken = [name for name in theirs if f"network/{name}" in ours]
    assert len(taken) > 0.9 * len(theirs)
    for name in taken:
        torch.testing.assert_close(ours[f"network/{name}"], theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "said"),
    [({"base_channels": 16}, "network.base_channels = 8"), ({"blocks_per_level": 2}, "network.blocks_per_level = 1")],
)
def test_a_bundle_that_does_not_fit_is_refused(store, dataset, straight, network, said):
    spec = toy_spec(dataset, toy_network(**network), init_from=straight[0].bundle(200).uri)
    with pytest.raises(UserError, match=said):
        open_run(store, spec)


def test_no_bundle_to_start_from(store, dataset, tmp_path):
    with pytest.raises(UserError, match="not a model bundle"):
        open_run(store, toy_spec(dataset, init_from=str(tmp_path / "nothing")))
