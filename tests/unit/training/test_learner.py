"""One optimizer step: accumulation equals the full batch, clipping, warm-up, the moving average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion_core.training.batches import Microbatch
from diffusion_core.training.config import TrainingConfig
from diffusion_core.training.ema import Ema
from diffusion_core.training.learner import Learner
from diffusion_core.training.world import World
from tests.toy_training import CLASSES, toy_network, toy_spec

SHAPE = (8, 8, 1)


def learner(network=None, **training):
    """One whose zero-initialised layers are random too: otherwise most gradients of a first step are 0."""
    made = Learner(toy_spec("unused", network, **training), SHAPE, CLASSES, World())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def cut(count, size, first=0):
    """`count` random images as microbatches of `size`."""
    generator = torch.Generator().manual_seed(first)
    x0, noise = torch.rand((2, count, 1, 8, 8), generator=generator) * 2 - 1
    t = torch.randint(0, 1000, (count,), generator=generator)
    label = torch.randint(0, CLASSES + 1, (count,), generator=generator)
    return [
        Microbatch(x0[at : at + size], noise[at : at + size], t[at : at + size], label[at : at + size], first + at, 1.0)
        for at in range(0, count, size)
    ]


@pytest.mark.parametrize("size", [1, 3, 4, 7, 9])
def test_accumulation_equals_the_full_batch(size):
    whole, parts = learner(grad_clip=None), learner(grad_clip=None)
    loss, norm = whole.step(10, cut(10, 10), 1)
    pieces = cut(10, size)
    loss_of_parts, norm_of_parts = parts.step(10, pieces, len(pieces))
    torch.testing.assert_close(loss_of_parts, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_of_parts, norm, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in whole.network.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in parts.network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 * scale)


def test_a_filler_counts_for_nothing():
    one, other = learner(), learner()
    real, filler = cut(10, 10)[0], cut(4, 4, first=99)[0]
    without = one.step(10, [real], 1)
    with_filler = other.step(10, [real, Microbatch(*list(vars(filler).values())[:-1], 0.0)], 2)
    assert torch.equal(without[0], with_filler[0])
    torch.testing.assert_close(without[1], with_filler[1])


def test_gradients_are_clipped_to_the_norm_and_reported_before():
    small, free = learner(grad_clip=1e-3), learner(grad_clip=None)
    _, norm = small.step(10, cut(10, 10), 1)
    _, unclipped = free.step(10, cut(10, 10), 1)
    after = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in small.network.parameters()]))
    assert norm == unclipped and float(norm) > 1e-3
    torch.testing.assert_close(after, torch.tensor(1e-3), rtol=1e-3, atol=0)
    loose = learner(grad_clip=1e6)
    loose.step(10, cut(10, 10), 1)
    pairs = zip(loose.network.parameters(), free.network.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_the_rate_rises_with_the_images_and_stays():
    warm = learner(warmup_images=100, learning_rate=0.01)
    assert [warm.learning_rate(seen) for seen in (10, 50, 100, 110, 10**9)] == [0.001, 0.005, 0.01, 0.01, 0.01]
    assert learner(warmup_images=0, learning_rate=0.01).learning_rate(10) == 0.01


def test_the_step_is_that_of_adamw():
    ours = learner(grad_clip=None, warmup_images=0, weight_decay=0.1, betas=(0.8, 0.95))
    theirs = learner(grad_clip=None)
    peer = torch.optim.AdamW(theirs.network.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.8, 0.95))
    for step in range(1, 4):
        ours.step(10 * step, cut(10, 5, first=step), 2)
        peer.zero_grad()
        for piece in cut(10, 5, first=step):
            losses = theirs.process.training_losses(theirs.network, piece.x0, piece.t, piece.noise, label=piece.label)
            (losses.sum() / 10).backward()
        peer.step()
    for a, b in zip(ours.network.parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_dropout_is_a_function_of_the_microbatch():
    one, other = learner(toy_network(dropout=0.5)), learner(toy_network(dropout=0.5))
    first = one.step(10, cut(10, 5), 2)
    torch.rand(1000)  # whatever else drew random numbers
    second = other.step(10, cut(10, 5), 2)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    elsewhere = [Microbatch(*list(vars(piece).values())[:4], piece.first + 10, 1.0) for piece in cut(10, 5)]
    assert learner(toy_network(dropout=0.5)).step(10, elsewhere, 2)[0] != first[0]


def test_the_state_restores_everything():
    one = learner()
    one.step(10, cut(10, 5), 2)
    one.step(20, cut(10, 5, 10), 2)
    spec = toy_spec("unused")
    other = Learner(spec, SHAPE, CLASSES, World(), one.state(), images_seen=20)
    one.step(30, cut(10, 5, 20), 2)
    other.step(30, cut(10, 5, 20), 2)
    for part, tensors in one.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.state()[part][name]), (part, name)
    strides = [(p.stride(), other.optimizer.state[p]["exp_avg"].stride()) for p in other.network.parameters()]
    assert all(weight == moment for weight, moment in strides), "the fused step walks through memory"


def test_bfloat16_keeps_weights_loss_and_moments_in_float32():
    halved, full = learner(precision="bfloat16"), learner()
    loss, norm = halved.step(10, cut(10, 5), 2)
    exact, _ = full.step(10, cut(10, 5), 2)
    assert loss.dtype == norm.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert {tensor.dtype for tensors in halved.state().values() for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_of_weights(channels_last):
    made = learner(channels_last=channels_last)
    kernels = [p for p in made.network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) == channels_last for p in kernels)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("count", torch.zeros(()))


def test_average_follows_the_published_formula():
    config = TrainingConfig(batch_size=100, microbatch_size=100, ema_halflife_images=1000, ema_rampup_ratio=None)
    network = Toy()
    average = Ema(network, config)
    expected = network.weight.detach().clone().double()
    for step in range(1, 30):
        with torch.no_grad():
            network.weight += 1.0
            network.count += 1
        average.update(100 * step)
        expected = 0.5**0.1 * expected + (1 - 0.5**0.1) * network.weight.double()
        torch.testing.assert_close(average.network.weight.double(), expected, rtol=1e-6, atol=1e-6)
        assert average.network.count == step
    assert not average.network.weight.requires_grad and not average.network.training


def test_average_forgets_half_in_a_half_life():
    config = TrainingConfig(batch_size=10, microbatch_size=10, ema_halflife_images=1000, ema_rampup_ratio=None)
    network = Toy()
    average = Ema(network, config)
    with torch.no_grad():
        network.weight.zero_()
    for step in range(1, 101):
        average.update(10 * step)
    torch.testing.assert_close(average.network.weight, torch.tensor([0.5, -1.0]), rtol=1e-5, atol=0)


def test_average_warms_up():
    config = TrainingConfig(batch_size=10, microbatch_size=10, ema_halflife_images=1000, ema_rampup_ratio=0.05)
    average = Ema(Toy(), config)
    assert average.decay(10) == 0.5 ** (10 / 0.5)
    assert average.decay(10_000) == 0.5 ** (10 / 500)
    assert average.decay(20_000) == average.decay(10**9) == 0.5 ** (10 / 1000)


def test_average_moves_with_optimizer_steps_only():
    made = learner()
    before = [parameter.clone() for parameter in made.ema.network.parameters()]
    made.process.training_losses(made.network, *[cut(4, 4)[0].x0], cut(4, 4)[0].t, cut(4, 4)[0].noise, label=None)
    assert all(torch.equal(a, b) for a, b in zip(before, made.ema.network.parameters(), strict=True))
    made.step(10, cut(10, 4), 3)
    assert not all(torch.equal(a, b) for a, b in zip(before, made.ema.network.parameters(), strict=True))
