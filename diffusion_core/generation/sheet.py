"""A contact sheet: a few images of each class, large enough to be seen, in a small PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion_core.generation.labels import Labels

MAX_BYTES = 300_000
MAX_CLASSES, PER_CLASS, WITHOUT_CLASSES = 16, 10, 100
_TILE, _GAP, _TEXT_HEIGHT = 48, 4, 12
_BACKGROUND = 190  # a grey that borders black images and white ones alike
_SCANNED = 1 << 20  # image ids that are looked at when classes are rare


def choose_images(ranges: Sequence[tuple[int, int]], labels: Labels) -> dict[int | None, list[int]]:
    """The lowest image ids of each class (of 16 evenly chosen ones if there are more), or the lowest 100 of all.

    Args:
        ranges: the ranges [first, stop) of image ids that are stored, sorted.
    """
    if labels.num_classes == 0:
        lowest = [image_id for first, stop in ranges for image_id in range(first, min(stop, first + WITHOUT_CLASSES))]
        return {None: lowest[:WITHOUT_CLASSES]}
    shown = min(MAX_CLASSES, labels.num_classes)
    rows: dict[int | None, list[int]] = {n * labels.num_classes // shown: [] for n in range(shown)}
    scanned = 0
    for first, stop in ranges:
        for start in range(first, stop, 4096):
            ids = np.arange(start, min(stop, start + 4096))
            of = labels.of(ids)
            for label, row in rows.items():
                row += ids[of == label][: PER_CLASS - len(row)].tolist()
            scanned += len(ids)
            if scanned >= _SCANNED or all(len(row) == PER_CLASS for row in rows.values()):
                return rows
    return rows


def contact_sheet(rows: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """PNG of less than 300 KB: a row per class with its name, images (H, W, C) uint8.

    Small images are enlarged by a whole number without smoothing, so that every pixel is seen as it is; large ones are
    reduced. A single row without a name is laid out as a square.
    """
    rows = {name: images for name, images in rows.items() if len(images)}
    if list(rows) == [""]:
        images = rows[""]
        width = max(1, round(len(images) ** 0.5))
        rows = {" " * n: images[n * width : (n + 1) * width] for n in range(-(-len(images) // width))}
    size = _TILE
    while True:
        data = _draw(rows, size)
        if len(data) < MAX_BYTES:
            return data
        if size > 24:
            size = size * 3 // 4
        else:
            rows = {name: images[: max(1, len(images) * 3 // 4)] for name, images in rows.items()}


def _draw(rows: Mapping[str, Sequence[np.ndarray]], size: int) -> bytes:
    font = ImageFont.load_default(_TEXT_HEIGHT)
    margin = max((int(font.getlength(name.strip()[:20])) for name in rows), default=0)
    margin += 2 * _GAP if margin else 0
    first = next(iter(rows.values()))[0] if rows else np.zeros((1, 1, 1), np.uint8)
    width, height = _tile_size(first, size)
    columns = max((len(images) for images in rows.values()), default=1)
    mode = "L" if first.shape[-1] == 1 else "RGB"
    canvas = (margin + columns * (width + _GAP) + _GAP, max(1, len(rows)) * (height + _GAP) + _GAP)
    sheet = Image.new(mode, canvas, _BACKGROUND if mode == "L" else (_BACKGROUND,) * 3)
    pen = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows.items()):
        top = _GAP + y * (height + _GAP)
        black = 0 if mode == "L" else (0, 0, 0)
        pen.text((_GAP, top + height // 2), name.strip()[:20], fill=black, font=font, anchor="lm")
        for x, image in enumerate(images):
            sheet.paste(_tile(image, width, height), (margin + _GAP + x * (width + _GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tile_size(image: np.ndarray, size: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= size:
        return width * (size // longest), height * (size // longest)
    return max(1, width * size // longest), max(1, height * size // longest)


def _tile(image: np.ndarray, width: int, height: int) -> Image.Image:
    tile = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))
    enlarged = width >= tile.width
    return tile.resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
