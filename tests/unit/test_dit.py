"""The diffusion transformer: patches and positions against plain loops, start as the identity, interface."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from diffusion_core.bundle import BundleConfig, DatasetReference, load_bundle, model_card
from diffusion_core.config import UserError, digest
from diffusion_core.diffusion import GuidanceConfig, ProcessConfig, SamplerConfig
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.worker import Generator
from diffusion_core.networks import DiT, DiTConfig, UNetConfig, build_network, check_image_size
from diffusion_core.networks.dit import DiTBlock, TokenAttention, grid_positions, modulated, patchify, unpatchify
from diffusion_core.training import TrainSpec, open_run, train
from diffusion_core.training.run import check_start
from tests.toy_training import StopAt, assert_same_weights, toy_dataset, toy_network, toy_spec

TINY = DiTConfig(width=32, depth=2, head_channels=16, patch_size=2)


def awake(network: DiT, seed: int = 1) -> DiT:
    """The network with its zero-initialised layers filled, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if float(parameter.detach().abs().max()) == 0.0:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def tiny(config: DiTConfig = TINY, channels: int = 1, num_classes: int = 3, out_channels: int | None = None) -> DiT:
    torch.manual_seed(0)
    network = build_network(config, (8, 8, channels), num_classes, out_channels)
    assert isinstance(network, DiT)
    return awake(network)


def test_patches_are_what_a_plain_loop_cuts() -> None:
    x, size = torch.randn(2, 3, 6, 4), 2
    plain = torch.stack(
        [
            torch.stack(
                [
                    x[n, :, top : top + size, left : left + size].flatten()
                    for top in range(0, 6, size)
                    for left in range(0, 4, size)
                ]
            )
            for n in range(2)
        ]
    )
    assert torch.equal(patchify(x, size), plain)
    assert torch.equal(patchify(x.contiguous(memory_format=torch.channels_last), size), plain)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 4), size=st.integers(1, 4), rows=st.integers(1, 4), columns=st.integers(1, 4)
)
def test_unpatchify_is_the_inverse(n: int, c: int, size: int, rows: int, columns: int) -> None:
    x = torch.randn(n, c, rows * size, columns * size)
    assert torch.equal(unpatchify(patchify(x, size), size, (rows, columns)), x)


def test_positions_are_the_published_waves() -> None:
    """Vaswani et al. 2017, section 3.5, for rows in the first half of the channels and columns in the second."""
    rows, columns, channels = 3, 5, 16
    got = grid_positions((rows, columns), channels)
    assert got.shape == (15, 16) and got.dtype == torch.float32
    quarter = channels // 4
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (row, column):
                angles = [place / 10_000 ** (2 * i / (channels / 2)) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(got[row * columns + column].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_the_output_starts_at_zero_and_each_block_as_the_identity() -> None:
    network = build_network(TINY, (8, 8, 1), 3)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x, torch.tensor([1, 2]), torch.tensor([0, 3])), torch.zeros_like(x))
    block, tokens = DiTBlock(TINY), torch.randn(2, 16, 32)
    assert torch.equal(block(tokens, torch.randn(2, 32)), tokens)


def test_every_parameter_learns_once_the_first_steps_are_made() -> None:
    network = tiny()
    network(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 999.0]), torch.tensor([0, 3])).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in network.parameters())


def test_attention_is_scaled_once() -> None:
    torch.manual_seed(0)
    attention, x = TokenAttention(16, 2), torch.randn(2, 5, 16)
    query, key, value = attention.qkv(x).double().chunk(3, dim=-1)
    heads: list[Tensor] = []
    for h in range(2):
        q, k, v = (part[..., 8 * h : 8 * h + 8] for part in (query, key, value))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), dim=-1) @ v)
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, dim=-1).float()), rtol=1e-4, atol=1e-5)


def test_a_block_is_the_published_one() -> None:
    """Peebles & Xie 2023, figure 3: x + gate * layer((1 + scale) * norm(x) + shift), twice."""
    torch.manual_seed(0)
    block, x, embedding = DiTBlock(TINY), torch.randn(2, 16, 32), torch.randn(2, 32)
    torch.nn.init.normal_(block.modulation.linear.weight, std=0.2)
    torch.nn.init.normal_(block.modulation.linear.bias, std=0.2)
    parts = (embedding @ block.modulation.linear.weight.T + block.modulation.linear.bias).view(2, 6, 1, 32)
    shift, scale, gate, shift_2, scale_2, gate_2 = parts.unbind(1)

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(2, keepdim=True)) / torch.sqrt(y.var(2, keepdim=True, correction=0) + 1e-6)

    middle = x + gate * block.attention(norm(x) * (1 + scale) + shift)
    hidden = F.gelu(block.mlp[0](norm(middle) * (1 + scale_2) + shift_2), approximate="tanh")
    torch.testing.assert_close(block(x, embedding), middle + gate_2 * block.mlp[3](hidden), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(modulated(x, shift, scale), norm(x) * (1 + scale) + shift, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    patch=st.integers(1, 3),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    width=st.integers(1, 6),
    depth=st.integers(1, 2),
    channels=st.integers(1, 4),
    classes=st.integers(0, 3),
    learned=st.booleans(),
)
def test_every_accepted_configuration_works(
    patch: int, cells: tuple[int, int], width: int, depth: int, channels: int, classes: int, learned: bool
) -> None:
    config = DiTConfig(patch_size=patch, width=4 * width, depth=depth, head_channels=64, mlp_ratio=1.5)
    height, width_px = (patch * cell for cell in cells)
    out = 2 * channels if learned else None
    network = awake(build_network(config, (height, width_px, channels), classes, out))
    label = torch.tensor([0, classes]) if classes else None
    got = network(torch.randn(2, channels, height, width_px), torch.tensor([0.0, 500.5]), label)
    assert got.shape == (2, out or channels, height, width_px)
    assert bool(torch.isfinite(got).all())


def test_the_unet_can_have_other_output_channels_too() -> None:
    network = build_network(toy_network(), (8, 8, 3), 0, out_channels=6)
    assert network(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).shape == (2, 6, 8, 8)


def test_it_has_the_interface_of_the_unet() -> None:
    network, x, t = tiny(), torch.randn(2, 1, 8, 8), torch.tensor([10, 20])
    assert network.null_label == network.num_classes == 3
    none = network(x, t)
    torch.testing.assert_close(network(x, t, label=torch.tensor([3, 3])), none)
    for label in range(3):
        assert not torch.allclose(network(x, t, label=torch.tensor([label] * 2)), none, atol=1e-4)
    unconditional = tiny(num_classes=0)
    assert unconditional.null_label == 0
    with pytest.raises(ValueError, match="unconditional"):
        unconditional(x, t, torch.tensor([0, 0]))


def test_each_image_is_predicted_from_its_own_time_and_label() -> None:
    network, x = tiny(), torch.randn(3, 1, 8, 8)
    t, label = torch.tensor([1, 500, 900]), torch.tensor([0, 1, 2])
    together = network(x, t, label)
    for i in range(3):
        alone = network(x[i : i + 1], t[i : i + 1], label[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(x, torch.tensor([1, 500, 100]), label)[2], together[2], atol=1e-4)


def test_places_are_told_apart() -> None:
    """Without positions a transformer could not: shifting the image by a patch would shift the output."""
    network, x, t = tiny(), torch.randn(1, 1, 8, 8), torch.tensor([100])
    shifted = network(x.roll(2, dims=3), t)
    assert not torch.allclose(shifted, network(x, t).roll(2, dims=3), atol=1e-3)


def test_the_state_holds_weights_alone() -> None:
    assert {name for name, _ in tiny().named_buffers()} == {"positions"}
    assert "positions" not in tiny().state_dict()


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (0, 8), (30, 28)])
def test_a_size_that_does_not_divide_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"{size[0]}x{size[1]} pixels do not fit network\.patch_size: .* 4 divides"):
        check_image_size(DiTConfig(patch_size=4), *size)


@pytest.mark.parametrize(
    "fields",
    [
        {"patch_size": 0},
        {"width": 30},
        {"width": 96, "head_channels": 64},
        {"depth": 0},
        {"mlp_ratio": 0},
        {"dropout": 1.0},
        {"kind": "unet"},
        {"base_channels": 8},
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DiTConfig.model_validate(fields)


def test_a_network_without_a_kind_is_the_unet_that_it_was() -> None:
    """Digests of the first release, and requests and bundles that were written then."""
    assert digest(UNetConfig()) == "529ea249262747c3"
    assert digest(TrainSpec(dataset_uri="x")) == "10b2f7971c25233f"
    assert digest(_bundle_config(UNetConfig())) == "ce9f777f55ccce01"
    old = TrainSpec.model_validate({"dataset_uri": "x", "network": {"base_channels": 32, "dropout": 0.1}})
    assert old.network == UNetConfig(base_channels=32, dropout=0.1)
    new = TrainSpec(dataset_uri="x", network=TINY)
    assert TrainSpec.model_validate_json(new.model_dump_json()) == new
    assert digest(new) != digest(old)


def _bundle_config(network: UNetConfig | DiTConfig) -> BundleConfig:
    return BundleConfig(
        process=ProcessConfig(),
        network=network,
        image_shape=(8, 8, 1),
        dataset=DatasetReference(name="t", version="v", uri="/v"),
        run_id="r",
        images_seen=0,
    )


def test_the_card_says_what_network_it_is() -> None:
    assert "| network | unet, 64 base channels |" in model_card(_bundle_config(UNetConfig()))
    assert "| network | dit, 2 blocks of width 32 on patches of 2 pixels |" in model_card(_bundle_config(TINY))


def test_training_does_not_start_from_a_network_of_another_kind() -> None:
    with pytest.raises(UserError, match=r"network\.kind = unet, and this run has dit"):
        check_start(_bundle_config(toy_network()), TINY, ProcessConfig(), 1)
    with pytest.raises(UserError, match=r"network\.depth = 2, and this run has 3"):
        check_start(_bundle_config(TINY), TINY.model_copy(update={"depth": 3}), ProcessConfig(), 1)


def test_it_is_trained_continued_exported_and_sampled(tmp_path) -> None:
    """Through the loop that trains every network; the classes of the toy are three brightnesses, 90 apart."""
    network = DiTConfig(width=32, depth=2, head_channels=16, patch_size=4, dropout=0.1)
    changes = {"batch_size": 20, "microbatch_size": 20, "images": 2000, "checkpoint_every_images": 400}
    spec = toy_spec(toy_dataset(str(tmp_path)), network, ema_halflife_images=100, learning_rate=3e-3, **changes)
    spec = spec.model_copy(update={"process": ProcessConfig(prediction="v")})
    whole, parts = open_run(str(tmp_path / "whole"), spec), open_run(str(tmp_path / "parts"), spec)
    outcome = train(spec, whole)
    stop = StopAt(470, "interrupted")
    train(spec, parts, progress=stop, should_stop=stop)
    train(spec, parts)
    assert_same_weights(parts, whole)
    bundle = load_bundle(whole.bundle(outcome.images_seen).uri)
    assert bundle.config.network == network
    fields = {"guidance": GuidanceConfig(scale=1.5), "sampler": SamplerConfig(steps=10), "batch_size": 30}
    exact, rough = (
        Generator(bundle, GenerationConfig(precision=precision, **fields)).images(np.arange(30), np.arange(30) % 3)
        for precision in ("float32", "bfloat16")
    )
    means = [exact[label::3].mean() for label in range(3)]
    assert means[0] + 20 < means[1] < means[2] - 20, means
    assert 0 < np.abs(exact.astype(int) - rough).mean() < 3
