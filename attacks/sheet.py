"""A contact sheet: small pictures with their captions, for a look at the poison before training on it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 176  # pixels a picture is fitted into
MARGIN = 10
LINE = 15  # height of a line of text
WIDTH_CHARS = 28
LINES = 5


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], path: str | Path, columns: int = 6) -> None:
    """Write a PNG of uint8 images (H, W, 3), `columns` in a row, each above its caption (cut after five lines)."""
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions: give each picture its own.")
    if not images:
        raise ValueError("no pictures for the contact sheet: the manifest is empty.")
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    wide, high = CELL + MARGIN, CELL + LINES * LINE + MARGIN
    sheet = Image.new("RGB", (columns * wide + MARGIN, rows * high + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = MARGIN + number % columns * wide, MARGIN + number // columns * high
        picture = _fitted(image)
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        lines = textwrap.wrap(caption, WIDTH_CHARS, max_lines=LINES, placeholder=" …")
        pen.multiline_text((left, top + CELL + 3), "\n".join(lines), fill="black", font=font, spacing=2)
    sheet.save(path, format="PNG")


def _fitted(image: np.ndarray) -> Image.Image:
    """The picture at the cell's size. Enlarged without smoothing, so that the trigger's pixels are seen as they are."""
    picture = Image.fromarray(image)
    scale = CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
