"""The U-Net: shapes, conditioning, start as the identity, and the traps of its parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion import GaussianProcess, make_schedule
from diffusion_core.networks import UNet, UNetConfig, build_network, check_image_size
from diffusion_core.networks.blocks import (
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedding,
    group_count,
)

TINY = UNetConfig(base_channels=8, channel_multipliers=(1, 2), blocks_per_level=1)


def awake(network: UNet) -> UNet:
    """The network with its zero-initialised layers filled, as after some training."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if float(parameter.detach().abs().max()) == 0.0:
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def tiny(channels: int = 1, num_classes: int = 3, config: UNetConfig = TINY) -> UNet:
    torch.manual_seed(0)
    return awake(build_network(config, (8, 8, channels), num_classes))


@pytest.mark.parametrize(
    ("size", "multipliers", "attention"),
    [
        ((8, 8), (1, 2), (4,)),
        ((28, 28), (1, 1, 2), (7, 14)),
        ((32, 32), (1, 2, 2), (16, 8)),
        ((16, 24), (1, 2, 2), (4,)),
        ((6, 2), (1, 1), ()),
        ((5, 3), (2,), (3,)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_that_divides(
    size: tuple[int, int], multipliers: tuple[int, ...], attention: tuple[int, ...], channels: int
) -> None:
    config = UNetConfig(base_channels=8, channel_multipliers=multipliers, attention_resolutions=attention)
    network = build_network(config, (*size, channels), 10)
    x = torch.randn(2, channels, *size)
    out = network(x, torch.tensor([3, 999]), torch.tensor([0, 10]))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@settings(max_examples=15, deadline=None)
@given(
    base=st.integers(1, 5),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 4),
    classes=st.integers(0, 3),
)
def test_every_accepted_configuration_works(
    base: int, multipliers: list[int], blocks: int, cells: tuple[int, int], channels: int, classes: int
) -> None:
    config = UNetConfig(base_channels=4 * base, channel_multipliers=tuple(multipliers), blocks_per_level=blocks)
    height, width = (config.size_divisor * cell for cell in cells)
    network = awake(build_network(config, (height, width, channels), classes))
    label = torch.tensor([0, classes]) if classes else None
    out = network(torch.randn(2, channels, height, width), torch.tensor([0.0, 500.5]), label)
    assert out.shape == (2, channels, height, width)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("size", [(30, 28), (28, 30), (7, 7), (0, 8)])
def test_a_size_that_does_not_divide_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"{size[0]}x{size[1]} pixels .*channel_multipliers.* 4 divides"):
        build_network(UNetConfig(), (*size, 3), 0)


def test_an_attention_size_that_never_occurs_is_refused() -> None:
    config = UNetConfig(attention_resolutions=(16,))
    check_image_size(config, 32, 32)
    check_image_size(config, 64, 32)
    with pytest.raises(UserError, match="16 never occurs with images of 28x28 pixels; accepted are 28, 14, 7"):
        check_image_size(config, 28, 28)


@pytest.mark.parametrize(
    "fields",
    [
        {"base_channels": 6},
        {"base_channels": 0},
        {"channel_multipliers": []},
        {"channel_multipliers": [1, 0]},
        {"blocks_per_level": 0},
        {"dropout": 1.0},
        {"kind": "dit"},
        {"base_channels": 96, "head_channels": 64},
        {"attention_resolutions": [0]},
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        UNetConfig.model_validate(fields)


def test_the_output_starts_at_zero_and_each_residual_branch_too() -> None:
    network = build_network(UNetConfig(base_channels=8, channel_multipliers=(1, 2)), (8, 8, 1), 3)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x, torch.tensor([1, 2])), torch.zeros_like(x))
    block = ResidualBlock(8, 8, 16, 0.0)
    h = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(h, torch.randn(2, 16)), h)
    assert torch.equal(SelfAttention(8, 2)(h), h)


def test_the_first_weights_of_a_seed_are_those_of_the_first_release() -> None:
    """They depend on the order in which the parts are made; that of runs that have begun must stay."""
    torch.manual_seed(0)
    config = UNetConfig(base_channels=8, channel_multipliers=(1, 2), attention_resolutions=(4,))
    state = build_network(config, (8, 8, 3), 3).state_dict()
    for name, first in (("middle_1.attention.qkv.weight", 0.0620905), ("up.5.block.conv_1.weight", -0.0429586)):
        assert float(state[name].flatten()[0]) == pytest.approx(first, abs=1e-6)


def test_the_null_label_is_num_classes_and_stands_for_none() -> None:
    network, x, t = tiny(), torch.randn(2, 1, 8, 8), torch.tensor([10, 20])
    assert network.null_label == 3
    assert network.class_embedding is not None
    assert network.class_embedding.num_embeddings == 4
    none = network(x, t)
    torch.testing.assert_close(network(x, t, torch.tensor([3, 3])), none)
    for label in range(3):
        assert not torch.allclose(network(x, t, torch.tensor([label] * 2)), none, atol=1e-4)


def test_an_unconditional_network_takes_no_labels() -> None:
    network = tiny(num_classes=0)
    assert network.null_label == 0
    assert network.class_embedding is None
    with pytest.raises(ValueError, match="unconditional"):
        network(torch.randn(1, 1, 8, 8), torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(UserError, match="num_classes"):
        build_network(TINY, (8, 8, 1), -1)


def test_each_image_is_predicted_from_its_own_time_and_label() -> None:
    network, x = tiny(), torch.randn(3, 1, 8, 8)
    t, label = torch.tensor([1, 500, 900]), torch.tensor([0, 1, 2])
    together = network(x, t, label)
    for i in range(3):
        torch.testing.assert_close(
            network(x[i : i + 1], t[i : i + 1], label[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5
        )
    changed = network(x, torch.tensor([1, 500, 100]), label)
    torch.testing.assert_close(changed[:2], together[:2])
    assert not torch.allclose(changed[2], together[2], atol=1e-4)


def test_times_of_any_dtype() -> None:
    network, x = tiny(), torch.randn(2, 1, 8, 8)
    expected = network(x, torch.tensor([7, 999]))
    for dtype in (torch.int32, torch.float32, torch.float64):
        torch.testing.assert_close(network(x, torch.tensor([7, 999], dtype=dtype)), expected, rtol=0, atol=0)
    assert not torch.equal(network(x, torch.tensor([7.5, 999.0])), expected)


def test_neighbouring_times_are_told_apart_in_half_precision() -> None:
    """bfloat16 has 8 bits: 998 and 999 would be the same number. They are turned into waves in float32."""
    embedding = TimestepEmbedding(32, 64).bfloat16()
    a, b = embedding(torch.tensor([998, 999]))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("channels", [4, 8, 12, 20, 32, 48, 96, 100, 128, 192, 320, 1000])
def test_groups_divide_channels_and_hold_at_least_four(channels: int) -> None:
    groups = group_count(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert channels // groups >= 4
    assert group_count(128) == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_group_norm_has_float32_statistics(dtype: torch.dtype, order: torch.memory_format) -> None:
    """A mean of 30 over 4 x 1024 elements: their squares' sum is infinite in float16, and nonsense in bfloat16."""
    torch.manual_seed(0)
    x = (torch.randn(2, 64, 32, 32) + 30).to(dtype).to(memory_format=order)
    norm = GroupNorm(64)
    with torch.autocast("cpu", dtype):
        got = norm(x)
    assert got.dtype == dtype
    expected = F.group_norm(x.double(), norm.num_groups, eps=norm.eps)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=0.03)


def test_attention_is_scaled_once_with_its_softmax_in_float32() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 2)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 16, 3, 5)
    places = attention.norm(x).flatten(2).transpose(1, 2)
    query, key, value = attention.qkv(places).double().chunk(3, dim=-1)
    heads: list[Tensor] = []
    for h in range(2):
        q, k, v = (part[..., 8 * h : 8 * h + 8] for part in (query, key, value))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), dim=-1) @ v)
    mixed = attention.out(torch.cat(heads, dim=-1).float())
    torch.testing.assert_close(attention(x), x + mixed.transpose(1, 2).reshape(x.shape), rtol=1e-4, atol=1e-4)


def test_a_level_narrower_than_a_head_has_one_head() -> None:
    config = UNetConfig(base_channels=8, channel_multipliers=(1, 2), attention_resolutions=(8, 4), head_channels=8)
    network = build_network(config, (8, 8, 1), 0)
    heads = [module.heads for module in network.modules() if isinstance(module, SelfAttention)]
    assert heads == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert UNetConfig(base_channels=8, head_channels=64)


def test_attention_is_where_it_was_asked_for() -> None:
    def count(**fields: object) -> int:
        config = UNetConfig.model_validate({"base_channels": 8, "channel_multipliers": [1, 1, 1], **fields})
        network = build_network(config, (16, 32, 1), 0)
        return sum(isinstance(module, SelfAttention) for module in network.modules())

    assert count(middle_attention=False) == 0
    assert count() == 1
    assert count(attention_resolutions=[8]) == 1 + 2 + 3
    assert count(attention_resolutions=[16, 4], middle_attention=False) == 2 * (2 + 3)


def test_the_embedding_scales_and_shifts() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, 4, 0.0)
    torch.nn.init.normal_(block.conv_2.weight)
    x, embedding = torch.randn(1, 8, 4, 4), torch.randn(1, 4)
    scale, shift = block.modulation(embedding).chunk(2, dim=1)
    h = block.norm_2(block.conv_1(F.silu(block.norm_1(x))))
    expected = x + block.conv_2(F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]))
    torch.testing.assert_close(block(x, embedding), expected)


def test_channels_last_and_autocast_agree_with_float32() -> None:
    config = UNetConfig(base_channels=16, channel_multipliers=(1, 2), attention_resolutions=(4,))
    network, x = tiny(3, config=config).requires_grad_(False), torch.randn(2, 3, 8, 8)
    t, label = torch.tensor([5, 700]), torch.tensor([0, 1])
    expected = network(x, t, label)
    last = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last), t, label), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = last(x, t, label)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - expected).norm() / expected.norm()) < 0.03


def test_dropout_only_in_training() -> None:
    network = tiny(config=TINY.model_copy(update={"dropout": 0.5}))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))
    torch.manual_seed(3)
    first = network(x, t)
    torch.manual_seed(3)
    assert torch.equal(first, network(x, t))


def test_weights_and_outputs_survive_a_state_dict() -> None:
    network, other = tiny(), build_network(TINY, (8, 8, 1), 3).eval()
    other.load_state_dict(network.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 6])
    assert torch.equal(network(x, t), other(x, t))


def test_it_exports_as_one_graph() -> None:
    """No branch depends on data, so that compilation does not fall apart."""
    network, x = tiny(), torch.randn(2, 1, 8, 8)
    t, label = torch.tensor([1, 2]), torch.tensor([0, 1])
    exported = torch.export.export(network, (x, t, label))
    torch.testing.assert_close(exported.module()(x, t, label), network(x, t, label))


def test_it_learns_which_label_has_which_picture() -> None:
    """Two classes of constant images: the noise is predicted better with the right label than with the wrong one."""
    torch.manual_seed(0)
    network = build_network(TINY, (8, 8, 1), 2)
    process = GaussianProcess(make_schedule("cosine"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    label = torch.arange(64) % 2
    x0 = (label * 1.2 - 0.6)[:, None, None, None].expand(64, 1, 8, 8)
    first, loss = None, torch.zeros(())
    for _ in range(60):
        t, noise = torch.randint(0, 1000, (64,)), torch.randn(64, 1, 8, 8)
        loss = process.training_losses(network, x0, t, noise, label=label).mean()
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(1, abs=0.1)
    assert loss.item() < 0.25
    with torch.no_grad():
        t, noise = torch.full((64,), 600), torch.randn(64, 1, 8, 8)
        right = process.training_losses(network, x0, t, noise, label=label).mean()
        wrong = process.training_losses(network, x0, t, noise, label=1 - label).mean()
    assert float(wrong) > 1.3 * float(right)
