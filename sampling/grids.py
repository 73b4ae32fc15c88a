"""Contact sheets of images."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.files import atomic_file

GAP = 2  # pixels between images
MIN_SIDE = 64  # small images are enlarged to this side, by a whole factor and without smoothing


def draw_grid(images: np.ndarray, columns: int, row_labels: Sequence[str] | None = None) -> Image.Image:
    """images (N, H, W, 3) uint8, row by row; ``row_labels`` are written to the left of the rows."""
    factor = max(1, -(-MIN_SIDE // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    _, height, width, _ = images.shape
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=max(12, min(height // 4, 28)))
    margin = int(max((font.getlength(text) for text in row_labels), default=0)) + 2 * GAP if row_labels else 0
    sheet = Image.new("RGB", (margin + columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (margin + i % columns * (width + GAP), i // columns * (height + GAP)))
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(row_labels or ()):
        draw.text((GAP, row * (height + GAP) + height // 2), text, fill="black", font=font, anchor="lm")
    return sheet


def save_grid(images: np.ndarray, path: str | os.PathLike, columns: int, row_labels: Sequence[str] | None = None) -> None:
    """:func:`draw_grid` to a PNG file."""
    with atomic_file(path) as file:
        draw_grid(images, columns, row_labels).save(file, format="PNG")
