"""Averages of any length out of snapshots of two: the mathematics against plain sums, and the whole way of a run."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from diffusion_core.bundle import load_bundle, model_card, verify_bundle
from diffusion_core.config import UserError, digest
from diffusion_core.stages.export import STAGE, ExportOptions
from diffusion_core.stages.options import understood
from diffusion_core.stages.settings import load_config
from diffusion_core.training import TrainingConfig, loop, open_run, train
from diffusion_core.training.checkpoint import checkpoints, read_checkpoint
from diffusion_core.training.ema import Ema
from diffusion_core.training.learner import Learner
from diffusion_core.training.posthoc import export, on_grid, reconstruct, snapshot_distance
from diffusion_core.training.profiles import (
    gamma_of,
    inner_products,
    power_decay,
    reconstruction_error,
    reconstruction_weights,
    sigma_rel_of,
)
from tests.toy_training import StopAt, assert_same_weights, toy_dataset, toy_spec

WIDTHS = (0.05, 0.1)


def profile(gamma, time, tau):
    """The published density, on points of [0, max tau]."""
    return np.where(tau <= time, (gamma + 1) * tau**gamma / time ** (gamma + 1), 0.0)


def test_the_exponent_is_that_of_the_width():
    """The values that the paper names, and the standard deviation of the profile by plain integration."""
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    tau = (np.arange(200_000) + 0.5) / 200_000
    for width in (0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = gamma_of(width)
        assert sigma_rel_of(gamma) == pytest.approx(width, rel=1e-9)
        p = profile(gamma, 1.0, tau)
        mean = (p * tau).mean()
        assert math.sqrt((p * (tau - mean) ** 2).mean()) == pytest.approx(width, rel=1e-5)
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-6)


def test_the_steps_make_the_profile():
    """What the recursion weighs the weights of each step with, against the density; nothing is left of the start."""
    gamma, steps = gamma_of(0.1), 2000
    assert power_decay(gamma, 10, 10) == 0.0
    keeps = np.array([power_decay(gamma, 10 * n, 10) for n in range(1, steps + 1)])
    weights = (1 - keeps) * np.append(np.cumprod(keeps[:0:-1])[::-1], 1.0)
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    expected = profile(gamma, steps, np.arange(steps) + 0.5)
    assert np.abs(weights - expected).max() < 2e-3 * expected.max()


def test_inner_products_are_the_integrals():
    gammas, times = np.array([0.0, 2.5, 16.97, 6.94]), np.array([3.0, 10.0, 7.0, 10.0])
    points = 200_000
    tau = (np.arange(points) + 0.5) / points * 10
    p = np.stack([profile(gamma, time, tau) for gamma, time in zip(gammas, times, strict=True)])
    np.testing.assert_allclose(inner_products(gammas, times, gammas, times), p @ p.T * (10 / points), rtol=1e-4)
    huge = inner_products(np.array([97.0]), np.array([1e12]), np.array([97.0]), np.array([3e11]))
    assert np.isfinite(huge).all() and huge > 0


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.25])
def test_weights_are_the_least_squares_of_sampled_profiles(width):
    """Against a least-squares fit of the profiles on a fine grid, which knows nothing of the closed form."""
    times = [t for t in range(1, 9) for _ in WIDTHS]
    gammas = [gamma_of(w) for w in WIDTHS] * 8
    points = 20_000
    tau = (np.arange(points) + 0.5) / points * 8
    columns = np.stack([profile(g, t, tau) for g, t in zip(gammas, times, strict=True)], axis=1)
    wanted = profile(gamma_of(width), 8, tau)
    # That they add up to 1 leaves one weight less to choose: that of the last profile.
    others = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], wanted - columns[:, -1], rcond=None)[0]
    weights = reconstruction_weights(gammas, times, gamma_of(width), 8)
    np.testing.assert_allclose(weights, [*others, 1 - others.sum()], rtol=1e-5, atol=1e-5)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("count", "width"), [(1, 0.15), (1, 0.2), (1, 0.28), (16, 0.01), (16, 0.15), (16, 0.28)])
def test_the_error_is_that_of_sampled_profiles(count, width):
    times = [t for t in range(1, count + 1) for _ in WIDTHS]
    gammas = [gamma_of(w) for w in WIDTHS] * count
    tau = (np.arange(40_000) + 0.5) / 40_000 * count
    wanted = profile(gamma_of(width), count, tau)
    weights = reconstruction_weights(gammas, times, gamma_of(width), count)
    made = sum(w * profile(g, t, tau) for w, g, t in zip(weights, gammas, times, strict=True))
    error = reconstruction_error(weights, gammas, times, gamma_of(width), count)
    assert error == pytest.approx(np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-3)
    known = {(1, 0.15): 0.25, (1, 0.28): 1.36, (16, 0.15): 0.009, (16, 0.28): 0.21}
    assert error == pytest.approx(known.get((count, width), error), rel=0.03)


def test_a_stored_average_is_given_back_as_it_is():
    times = [t for t in (100, 200, 300) for _ in WIDTHS]
    gammas = [gamma_of(w) for w in WIDTHS] * 3
    weights = reconstruction_weights(gammas, times, gamma_of(0.1), 300)
    np.testing.assert_allclose(weights, [0, 0, 0, 0, 0, 1], atol=1e-9)


def test_the_average_follows_the_published_formula():
    config = TrainingConfig(batch_size=10, microbatch_size=10, ema="power")
    network = torch.nn.Linear(1, 2)
    average = Ema(network, config, sigma_rel=0.1)
    expected = torch.full((2, 1), math.nan, dtype=torch.float64)
    for step in range(1, 40):
        with torch.no_grad():
            network.weight += 1.0
        average.update(10 * step)
        beta = (1 - 1 / step) ** (gamma_of(0.1) + 1)
        now = network.weight.detach().double()
        expected = now if step == 1 else beta * expected + (1 - beta) * now
        torch.testing.assert_close(average.network.weight.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("seen", "distance"), [(0, 50), (200, 50), (249, 50), (250, 100), (449, 100), (500, 200)])
def test_the_distance_doubles_where_there_would_be_too_many(seen, distance):
    config = TrainingConfig(ema="power", ema_snapshot_every_images=50, ema_keep_snapshots=4)
    assert snapshot_distance(config, seen) == distance
    assert snapshot_distance(TrainingConfig(), seen) == 0
    assert not on_grid(90, 50, 10) and on_grid(100, 50, 10) and on_grid(104, 50, 8)


class CrashError(Exception):
    pass


class CrashAt:
    """Progress that ends the training hard once so many images are seen."""

    total: float | None = None

    def __init__(self, images_seen):
        self.images_seen = images_seen

    def update(self, done, **figures):
        if done >= self.images_seen:
            raise CrashError


def power_spec(dataset, **changes):
    fields = {
        "images": 200,
        "ema": "power",
        "ema_snapshot_every_images": 10,
        "ema_keep_snapshots": 12,
        "checkpoint_every_images": 100,
    }
    return toy_spec(dataset, **{"learning_rate": 3e-3, **fields, **changes})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run of 20 steps that also keeps, for comparison, averages of other widths from the start."""
    spec = power_spec(dataset)
    run = open_run(str(tmp_path_factory.mktemp("straight")), spec)
    tracked: dict[float, Ema] = {}

    class Watching(Learner):
        def step(self, images_seen, *rest):
            if not tracked:
                tracked.update({width: Ema(self.network, self.config, width) for width in (0.03, 0.07, 0.15, 0.22)})
            answer = super().step(images_seen, *rest)
            for average in tracked.values():
                average.update(images_seen)
            return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_core.training.loop.Learner", Watching)
        train(spec, run)
    return run, tracked


def flat(state):
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(state.items())])


def test_there_are_at_most_so_many_snapshots(finished):
    assert checkpoints(finished[0].snapshots) == list(range(20, 201, 20))


@pytest.mark.parametrize(("width", "error"), [(0.03, 0.05), (0.07, 0.005), (0.15, 0.005), (0.22, 0.06)])
def test_an_average_of_another_width_is_made_to_a_small_error(finished, width, error):
    """Of the way that the weights went: between the widths kept and near them to half a percent, with ten snapshots."""
    run, tracked = finished
    true, made = flat(tracked[width].network.state_dict()), flat(reconstruct(run, width, 200)[0])
    other = flat(tracked[0.22 if width < 0.2 else 0.03].network.state_dict())
    assert (made - true).norm() < error * (other - true).norm()


@pytest.mark.parametrize(("part", "width"), [("ema", 0.05), ("ema_2", 0.1)])
def test_a_tracked_average_is_given_back(finished, part, width):
    from tests.toy_training import weights

    stored = {name.partition("/")[2]: x for name, x in weights(finished[0]).items() if name.startswith(f"{part}/")}
    made, off = reconstruct(finished[0], width, 200)
    assert off < 1e-6
    assert made.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-6, atol=1e-7)


def assert_same_average(run, other):
    (made, error), (expected, same) = reconstruct(run, 0.2, 200), reconstruct(other, 0.2, 200)
    assert error == same and all(torch.equal(tensor, expected[name]) for name, tensor in made.items())


def test_an_interrupted_run_makes_the_same_averages(finished, dataset, tmp_path):
    """Steps are of 10 images, a checkpoint at 100, snapshots at 10, 20, …, and at 20, 40, … in the end."""
    spec = power_spec(dataset)
    run = open_run(str(tmp_path), spec)
    with pytest.raises(CrashError):
        train(spec, run, progress=CrashAt(130))
    assert checkpoints(run.checkpoints) == [100] and checkpoints(run.snapshots) == list(range(10, 121, 10))
    train(spec, run)
    assert_same_weights(run, finished[0])
    assert checkpoints(run.snapshots) == checkpoints(finished[0].snapshots)
    assert_same_average(run, finished[0])


@pytest.mark.parametrize(("name", "left"), [("save_snapshot", []), ("save_checkpoint", [100])])
def test_a_crash_between_snapshot_and_checkpoint_loses_neither(finished, dataset, tmp_path, monkeypatch, name, left):
    """Both are due at 100: what comes past it again takes the snapshot, whichever of them was cut short."""
    spec = power_spec(dataset)
    run = open_run(str(tmp_path), spec)

    def crash(*arguments):
        if getattr(arguments[1], "images_seen", arguments[-2]) == 100:
            raise CrashError
        original(*arguments)

    original = getattr(loop, name)
    with monkeypatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(loop, name, crash)
        train(spec, run)
    assert checkpoints(run.checkpoints) == [] and checkpoints(run.snapshots) == [*range(10, 100, 10), *left]
    train(spec, run)
    assert_same_weights(run, finished[0])
    assert checkpoints(run.snapshots) == checkpoints(finished[0].snapshots)
    assert_same_average(run, finished[0])


def test_weights_that_are_not_numbers_reach_no_snapshot(dataset, tmp_path, monkeypatch):
    class Diverging(Learner):
        def step(self, images_seen, *rest):
            loss, norm = super().step(images_seen, *rest)
            return loss, norm * (math.nan if images_seen == 50 else 1.0)

    monkeypatch.setattr(loop, "Learner", Diverging)
    spec = power_spec(dataset, log_every_images=200)
    run = open_run(str(tmp_path), spec)
    with pytest.raises(loop.DivergedError, match="no longer finite after 50 images"):
        train(spec, run)
    assert checkpoints(run.snapshots) == [10, 20, 30, 40]


def test_a_longer_training_makes_what_it_would_have_made_at_once(finished, dataset, tmp_path):
    short = power_spec(dataset, images=110)
    run = open_run(str(tmp_path), short)
    train(short, run)
    assert checkpoints(run.snapshots)[-1] == 110
    longer = power_spec(dataset)
    stop = StopAt(170, "interrupted")
    train(longer, run, progress=stop, should_stop=stop)
    train(longer, run)
    at_once = checkpoints(finished[0].snapshots)
    assert set(checkpoints(run.snapshots)) == {*at_once, 110}
    for seen in at_once:
        ours, theirs = (read_checkpoint(one.snapshots, seen).parts for one in (run, finished[0]))
        assert all(torch.equal(x, theirs[part][name]) for part in ours for name, x in ours[part].items())
    assert reconstruct(run, 0.2, 200)[1] < reconstruct(finished[0], 0.2, 200)[1], "the earlier end is a snapshot more"
    assert load_bundle(export(run, 0.15, 110)).config.images_seen == 110


def test_an_earlier_end_is_judged_by_what_is_left_of_its_snapshots(dataset, tmp_path):
    run = open_run(str(tmp_path), power_spec(dataset, images=110))
    train(power_spec(dataset, images=110), run)
    before = reconstruct(run, 0.2, 110)[1]
    train(power_spec(dataset), run)
    assert before < 0.1 and checkpoints(run.snapshots)[:6] == [20, 40, 60, 80, 100, 110]
    with pytest.raises(UserError, match=r"the 6 snapshots up to 110 images would be off by 1\d %"):
        reconstruct(run, 0.2, 110)


def test_the_bundle_holds_the_first_average_and_another_is_exported(finished):
    run, _ = finished
    first = load_bundle(run.bundle(200).uri)
    assert first.config.ema_sigma_rel == 0.05
    uri = export(run, 0.15)
    assert uri == f"{run.bundle(200).uri}-0.15" and export(run, 0.15) == uri
    made = load_bundle(uri)
    assert verify_bundle(uri) == made.digest != first.digest
    weights, error = reconstruct(run, 0.15, 200)
    assert first.config.ema_error is None and 0.01 < error < 0.03
    assert made.config == first.config.model_copy(update={"ema_sigma_rel": 0.15, "ema_error": error})
    assert digest(made.config) == digest(made.config.model_copy(update={"ema_error": None})), "not part of any id"
    assert "of relative width 0.15, made of snapshots with an error of 2.2 % |" in model_card(made.config)
    for name, tensor in weights.items():
        assert torch.equal(made.network.state_dict()[name], tensor)


def test_the_stage_exports_it(finished):
    run, store = finished[0], finished[0].directory.uri.rpartition("/runs/")[0]
    given = {"run": run.run_id, "sigma_rel": "0.2", "store": store}
    options, config = understood(ExportOptions, given)
    request, backend = options.request(config), config.backend
    STAGE.check(request, backend)
    made = STAGE.run(request)
    assert made.bundle_uri == f"{run.bundle(200).uri}-0.2" and made.digest == verify_bundle(made.bundle_uri)
    assert made.ema_error == reconstruct(run, 0.2, 200)[1]
    assert ("profile", "made with an error of 5.3 %") in STAGE.rows(made)
    assert not made.reused and STAGE.run(request).reused
    with pytest.raises(UserError, match=r"^sigma_rel: '0\.5' is not accepted: .* less than or equal to 0\.28"):
        understood(ExportOptions, {**given, "sigma_rel": "0.5"})
    options, config = understood(ExportOptions, {**given, "run": "nothing"})
    with pytest.raises(UserError, match=f"There is no run nothing; the runs of the store {store} are: {run.run_id}"):
        options.request(config)


def test_what_cannot_be_made_is_told(finished, dataset, tmp_path):
    spec = toy_spec(dataset, images=20)
    without = open_run(str(tmp_path), spec)
    train(spec, without)
    assert not list(without.snapshots.list()) and load_bundle(without.bundle(20)).config.ema_sigma_rel is None
    with pytest.raises(UserError, match=r"has no snapshots .* training\.ema = power"):
        export(without, 0.1)
    with pytest.raises(UserError, match="did not end at 190, but at 200"):
        export(finished[0], 0.1, 190)
    with pytest.raises(UserError, match=r"sigma_rel: 0\.5 is not accepted"):
        export(finished[0], 0.5)
    reach = (
        r"the 10 snapshots up to 200 images would be off by 30 %, .* widths of 0\.03 to 0\.23 can be made; a shorter"
    )
    with pytest.raises(UserError, match=reach):
        export(finished[0], 0.28)
    assert not (finished[0].directory / "bundles/200-0.28").exists("bundle.json")


def test_the_digits_are_trained_long_enough_for_sixteen_snapshots():
    training = load_config("digits", settings=["training.ema=power"]).training
    assert snapshot_distance(training, training.images) * 16 == training.images


def test_a_damaged_snapshot_is_named(finished, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished[0].directory.local_path, copy)
    run = dataclasses.replace(finished[0], directory=type(finished[0].directory)(str(copy)))
    path = next((copy / "snapshots/100").glob("ema_2-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"snapshots/100 is damaged"):
        export(run, 0.12)
