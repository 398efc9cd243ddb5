"""Pixels: one rounding for the whole project, and its inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.diffusion import from_uint8, images_from_network, images_to_network, to_uint8


def test_every_byte_survives_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(pixels)
    assert x.dtype == torch.float32
    assert float(x.min()) == -1.0 and float(x.max()) == 1.0
    assert torch.equal(to_uint8(x), pixels)
    assert torch.equal(to_uint8(x.double()), pixels)


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3, width=32))
def test_rounding_is_half_up_after_clamping(value: float) -> None:
    expected = math.floor((min(max(value, -1.0), 1.0) + 1.0) * 127.5 + 0.5)
    assert int(to_uint8(torch.tensor(value, dtype=torch.float64))) == expected


def test_a_half_goes_up() -> None:
    """Grey, 0, is the one half (127.5) that floating point holds exactly."""
    assert to_uint8(torch.zeros(1)).tolist() == [128]
    assert to_uint8(torch.tensor([-1e-6, 1e-6])).tolist() == [127, 128]


def test_what_is_out_of_range_is_clamped_not_wrapped() -> None:
    assert to_uint8(torch.tensor([-math.inf, -1.01, 1.01, 300.0, math.inf])).tolist() == [0, 0, 255, 255, 255]


def test_half_precision_is_widened_before_scaling() -> None:
    x = from_uint8(torch.arange(256, dtype=torch.uint8)).half()
    assert int((to_uint8(x).int() - torch.arange(256).int()).abs().max()) == 0


def test_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_go_to_the_network_and_back(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, channels), dtype=np.uint8)
    images.setflags(write=False)
    x = images_to_network(images)
    assert x.shape == (5, channels, 6, 4)
    assert float(x[2, channels - 1, 3, 1]) == pytest.approx(images[2, 3, 1, channels - 1] / 127.5 - 1)
    back = images_from_network(x)
    assert back.dtype == np.uint8 and back.flags.c_contiguous
    assert (back == images).all()
    assert torch.equal(images_to_network(torch.from_numpy(images.copy())), x)
