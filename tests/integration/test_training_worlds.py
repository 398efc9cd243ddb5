"""Several processes train what one would: same samples, same noise, same losses; and they continue bit-equal."""

from __future__ import annotations

import pytest
import torch

from diffusion_core.config import UserError
from diffusion_core.training import open_run, train
from diffusion_core.training.run import INTERRUPTED
from diffusion_core.training.world import Decision
from tests.toy_training import (
    StopAt,
    assert_same_weights,
    losses,
    run_world,
    toy_dataset,
    toy_network,
    toy_spec,
    weights,
)

STEPS = {"log_every_images": 10, "checkpoint_every_images": 100, "images": 300, "time_budget_s": 1000}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """30 steps in one process."""
    spec = toy_spec(dataset, **STEPS)
    run = open_run(str(tmp_path_factory.mktemp("alone")), spec)
    train(spec, run)
    return run


def straight_and_in_two_parts(world, dataset, straight, parts, changes):
    """Train once without a stop, and once with a stop after 17 of 30 steps."""
    spec = toy_spec(dataset, **STEPS, **changes)
    train(spec, open_run(straight, spec), world)
    stop = StopAt(170, INTERRUPTED)
    stopped = train(spec, open_run(parts, spec), world, progress=stop, should_stop=stop)
    assert stopped.stopped == INTERRUPTED and stopped.images_seen == 180, "all stop together, one step later"
    assert train(spec, open_run(parts, spec), world).images_seen == 300


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_the_same(dataset, alone, tmp_path, size):
    """Three microbatches of 4, 4 and 2 images over 2, 3 and 4 processes: unequal shares, and one with none."""
    straight, parts = str(tmp_path / "straight"), str(tmp_path / "parts")
    run_world(size, straight_and_in_two_parts, dataset, straight, parts, {})
    spec = toy_spec(dataset, **STEPS)
    whole, stopped = open_run(straight, spec), open_run(parts, spec)
    assert_same_weights(stopped, whole)
    ours, theirs = losses(whole), losses(alone)
    assert list(ours) == list(theirs) == list(range(10, 310, 10))
    for seen, loss in theirs.items():
        assert ours[seen] == pytest.approx(loss, rel=2e-6), seen
    for name, tensor in weights(alone).items():
        if name.startswith(("network", "ema")):
            torch.testing.assert_close(weights(whole)[name], tensor, rtol=1e-3, atol=2e-4)


def dropout_and_bfloat16(world, dataset, store):
    spec = toy_spec(dataset, toy_network(dropout=0.2), images=100, log_every_images=10, precision="bfloat16")
    train(spec, open_run(store, spec), world)


def test_dropout_is_the_same_for_any_number_of_processes(dataset, tmp_path):
    together, single = str(tmp_path / "together"), str(tmp_path / "single")
    run_world(2, dropout_and_bfloat16, dataset, together)
    spec = toy_spec(dataset, toy_network(dropout=0.2), images=100, log_every_images=10, precision="bfloat16")
    train(spec, open_run(single, spec))
    ours, theirs = losses(open_run(together, spec)), losses(open_run(single, spec))
    assert ours == {seen: pytest.approx(loss, rel=2e-3) for seen, loss in theirs.items()}


def starts_the_same(world, dataset, origin, store):
    spec = toy_spec(dataset, init_from=origin, images=20, log_every_images=10)
    train(spec, open_run(store, spec), world, start=origin)


def test_starting_weights_reach_all_processes(dataset, alone, tmp_path):
    origin = alone.bundle(300).uri
    run_world(2, starts_the_same, dataset, origin, str(tmp_path / "two"))
    spec = toy_spec(dataset, init_from=origin, images=20, log_every_images=10)
    single = open_run(str(tmp_path / "one"), spec)
    train(spec, single, start=origin)
    ours, theirs = losses(open_run(str(tmp_path / "two"), spec)), losses(single)
    assert ours == {seen: pytest.approx(loss, rel=2e-6) for seen, loss in theirs.items()}


def diverges(world, dataset, store):
    spec = toy_spec(dataset, learning_rate=1.0, weight_decay=10.0, grad_clip=None, warmup_images=0, images=20_000)
    with pytest.raises(UserError, match="no longer finite"):
        train(spec, open_run(store, spec), world)


def test_all_processes_stop_together_when_the_loss_is_not_finite(dataset, store):
    run_world(2, diverges, dataset, store)


def takes_a_run_that_is_held(world, dataset, store, held_s):
    """The holder is this world's leader in another guise; between processes nothing may last longer than 3 s."""
    import datetime
    import threading

    import torch.distributed as dist

    from diffusion_core.store.lease import claim
    from diffusion_core.training.__main__ import take_run

    world.control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=3))
    spec = toy_spec(dataset, images=20)
    run = open_run(store, spec)
    if world.leads:
        threading.Timer(held_s, claim(run.attempts, {}).end).start()
    is_finished, lease = take_run(run, spec, world)
    assert not is_finished and (lease is not None) == world.leads
    if lease is not None:
        assert lease.number == 2
        lease.end()
    train(spec, run, world)
    world.from_leader([0])
    assert take_run(run, spec, world) == (True, None)


def test_processes_wait_together_for_a_run_that_another_attempt_holds(dataset, store):
    run_world(2, takes_a_run_that_is_held, dataset, store, 5.0)


def decides(world):
    decision = Decision(world)
    heard = [decision.exchange(step if world.leads else 100 + step) for step in range(1, 6)]
    assert heard == [0, 1, 2, 3, 4] and decision.settle() == 5
    assert world.from_leader([1.5 + world.rank, float("nan")])[0] == 1.5
    assert world.sum(torch.tensor([float(world.rank)])).item() == 3.0


def test_the_leader_decides_for_all():
    run_world(3, decides)
