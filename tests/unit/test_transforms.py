"""From what people have to (H, W, C) uint8, or a reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_core.data.config import DatasetConfig
from diffusion_core.data.transforms import RejectedItem, Transform
from tests.image_files import BROKEN, encoded, pixels


def transform(item, **options) -> np.ndarray:
    config = DatasetConfig(name="x", **({"image_size": 8} | options))
    return Transform(config, config.size)(item)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_passes_unchanged(channels):
    image = pixels(0, 8, 8, channels)
    wanted = image.reshape(8, 8, channels)
    np.testing.assert_array_equal(transform(encoded(image), channels=channels), wanted)
    np.testing.assert_array_equal(transform(image, channels=channels), wanted)
    np.testing.assert_array_equal(transform(wanted, channels=channels), wanted)


@pytest.mark.parametrize("name", list(BROKEN))
def test_every_kind_of_broken_file_has_a_reason(name):
    content, reason = BROKEN[name]
    with pytest.raises(RejectedItem, match=reason):
        transform(content)


@given(
    cut=st.integers(1, 2500), flip=st.integers(0, 2500), form=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
)
@settings(max_examples=60, deadline=None)
def test_damage_is_a_reason_or_a_picture_and_nothing_else(cut, flip, form):
    data = bytearray(encoded(pixels(3, 24, 24), form))
    data[flip % len(data)] ^= 0xFF
    try:
        assert transform(bytes(data[:cut])).shape == (8, 8, 3)
    except RejectedItem as error:
        assert str(error)


def test_exif_orientation_turns_the_image():
    image = pixels(1, 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    np.testing.assert_array_equal(transform(encoded(image, exif=exif)), np.rot90(image, -1))


def test_transparency_shows_the_background():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:, :4] = (200, 10, 30, 255)
    result = transform(encoded(image), background=(1, 2, 3))
    assert (result[:, :4] == (200, 10, 30)).all() and (result[:, 4:] == (1, 2, 3)).all()
    half = np.full((8, 8, 4), (100, 100, 100, 128), np.uint8)
    assert abs(int(transform(encoded(half), channels=1)[0, 0, 0]) - 177) <= 1  # 100·128/255 + 255·127/255


def test_palette_transparency_and_grey_with_alpha():
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((0, 0), 1)
    result = transform(encoded(palette, transparency=0))
    assert tuple(result[0, 0]) == (50, 60, 70) and tuple(result[1, 1]) == (255, 255, 255)
    grey = np.dstack([np.full((8, 8), 40, np.uint8), np.zeros((8, 8), np.uint8)])
    assert (transform(encoded(Image.fromarray(grey, "LA")), channels=1) == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    form = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    image = Image.fromarray(pixels(2, 8, 8))
    image = image.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (8, 8))
    assert transform(encoded(image, form), channels=channels).shape == (8, 8, channels)


def test_sixteen_bits_keep_the_upper_eight():
    image = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024).astype(np.uint16)
    np.testing.assert_array_equal(transform(encoded(image), channels=1)[:, :, 0], image >> 8)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert tuple(transform(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0]) == (255, 0, 0)


def test_resizing_covers_and_keeps_the_centre():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 255  # the middle 20 columns are what a square crop keeps
    assert (transform(encoded(image), image_size=10, filter="box") == 255).all()
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    assert (transform(encoded(tall), image_size=10, filter="box") == 255).all()
    wide = transform(encoded(image), image_size=(10, 20), filter="box")
    np.testing.assert_array_equal(wide[:, :, 0], image[::2, ::2, 0])


def test_shrinking_by_a_box_filter_is_the_average():
    image = pixels(5, 16, 16, 1)
    mean = image.reshape(8, 2, 8, 2).mean((1, 3))
    assert (
        np.abs(transform(encoded(image), channels=1, filter="box")[:, :, 0] - mean).max() <= 1
    )  # Pillow rounds after each direction


@given(height=st.integers(8, 40), width=st.integers(8, 40), target=st.tuples(st.integers(1, 8), st.integers(1, 8)))
@settings(max_examples=40, deadline=None)
def test_any_size_that_is_large_enough_is_taken(height, width, target):
    flat = np.full((height, width, 3), (10, 128, 250), np.uint8)
    result = transform(encoded(flat), image_size=target)
    assert result.shape == (*target, 3) and (result == (10, 128, 250)).all()


def test_nothing_is_enlarged_unless_asked_for():
    for shape in ((7, 30), (30, 7)):
        with pytest.raises(RejectedItem, match="smaller than 8x8"):
            transform(encoded(pixels(6, *shape)))
        assert transform(encoded(pixels(6, *shape)), allow_upscale=True).shape == (8, 8, 3)


def test_without_a_size_all_must_be_alike():
    config = DatasetConfig(name="x")
    assert Transform(config, (9, 7))(encoded(pixels(7, 9, 7))).shape == (9, 7, 3)
    with pytest.raises(RejectedItem, match="8x8 pixels, and the first image has 7x9"):
        Transform(config, (9, 7))(encoded(pixels(7, 8, 8)))


def test_limits_hold_before_anything_is_decoded():
    with pytest.raises(RejectedItem, match="more than max_pixels = 100"):
        transform(encoded(pixels(8, 11, 11)), max_pixels=100)
    with pytest.raises(RejectedItem, match="too large a file: 1,048,577 bytes"):
        transform(b"x" * ((1 << 20) + 1), max_file_mb=1)


def test_a_worker_short_of_memory_rejects_nothing(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(MemoryError):
        transform(encoded(pixels(0, 8, 8, 1)))
