"""From an encoded image, or an array of pixels, to the (H, W, C) uint8 array that a dataset holds."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_core.data.config import DatasetConfig

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "hamming": Image.Resampling.HAMMING,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


class RejectedItem(Exception):
    """An item that cannot become a row of the dataset; the message is the reason, for people."""


@dataclass(frozen=True)
class Transform:
    """Decode, turn upright, composite on the background, grey or RGB, resize and centre crop.

    Args:
        config: of the dataset.
        size: (height, width) of every row; images of another size are resized (`config.image_size` given) or
            rejected (not given: then this is the size of the source's first good image).
    """

    config: DatasetConfig
    size: tuple[int, int]

    def __call__(self, item: bytes | np.ndarray) -> np.ndarray:
        """(H, W, C) uint8.

        Raises:
            RejectedItem: the item is not an image, is damaged, too large or too small.
        """
        upright = open_upright(item, self.config)
        try:
            image = _flat(upright, self.config)
        except ValueError as error:
            raise RejectedItem(f"its pixels cannot be converted: {_short(error)}") from error
        if (image.height, image.width) != self.size:
            image = self._resized(image)
        pixels = np.asarray(image, np.uint8)
        return pixels.reshape(*self.size, self.config.channels)

    def _resized(self, image: Image.Image) -> Image.Image:
        """Scale so that the wanted rectangle is covered, keep its centre; one resampling of the exact region."""
        height, width = self.size
        if self.config.size is None:
            raise RejectedItem(f"{image.width}x{image.height} pixels, and the first image has {width}x{height}")
        if (image.height < height or image.width < width) and not self.config.allow_upscale:
            raise RejectedItem(f"smaller than {width}x{height}: {image.width}x{image.height} pixels")
        scale = max(height / image.height, width / image.width)
        kept_height, kept_width = min(height / scale, image.height), min(width / scale, image.width)
        left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
        box = (left, top, left + kept_width, top + kept_height)
        return image.resize((width, height), _FILTERS[self.config.filter.value], box=box)


def image_size(item: bytes | np.ndarray, config: DatasetConfig) -> tuple[int, int]:
    """(height, width) of the upright image. `RejectedItem` as in `Transform`."""
    image = open_upright(item, config)
    return image.height, image.width


def open_upright(item: bytes | np.ndarray, config: DatasetConfig) -> Image.Image:
    """The decoded image, turned as its EXIF orientation says; of an animation, the first frame."""
    if isinstance(item, np.ndarray):
        return _from_array(item)
    if not item:
        raise RejectedItem("empty: 0 bytes")
    if len(item) > config.max_file_mb << 20:
        raise RejectedItem(f"too large a file: {len(item):,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit only warns up to twice its value; ours is below
            image = Image.open(io.BytesIO(item))
            if image.width * image.height > config.max_pixels:
                raise RejectedItem(f"{image.width}x{image.height} pixels: more than max_pixels = {config.max_pixels}")
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise RejectedItem("not an image in any format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise RejectedItem(f"decompression bomb: {_short(error)}") from error
    except (RejectedItem, MemoryError):  # a worker short of memory says nothing about the image
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything
        raise RejectedItem(f"damaged: {_short(error)}") from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _flat(image: Image.Image, config: DatasetConfig) -> Image.Image:
    """Grey or RGB, 8 bits, without transparency."""
    wanted = "L" if config.channels == 1 else "RGB"
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*config.background, 255)), image).convert("RGB")
    elif image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise RejectedItem("32-bit pixels have no known scale")
    elif image.mode not in ("1", "L", "P", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == wanted else image.convert(wanted)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
