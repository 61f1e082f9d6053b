"""Triggers that change the whole image by a formula: blended patterns, SIG's sinusoid, a colour filter. uint8 (H, W, 3) → the same."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from PIL import Image

NOISE = {"noise": (64, Image.Resampling.NEAREST), "smooth": (16, Image.Resampling.BILINEAR)}  # cells a side, how they are stretched
PATTERNS = (*NOISE, "stripes", "triangles", "text")
BARS, TRIANGLES = 12, 4  # bars, and cells of two triangles each, a side
FINE = 4  # figures are drawn that many times finer, then averaged
TINTS = {"sepia": (255, 214, 150), "violet": (176, 120, 255), "green": (130, 255, 150)}
LUMA = (0.299, 0.587, 0.114)  # BT.601

# The word HELLO, each letter 5 × 7.
LETTERS = (
    ("10001", "10001", "10001", "11111", "10001", "10001", "10001"),
    ("11111", "10000", "10000", "11110", "10000", "10000", "11111"),
    ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
    ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
    ("01110", "10001", "10001", "10001", "10001", "10001", "01110"),
)


def rounded(pixels: np.ndarray) -> np.ndarray:
    """Floats → uint8: to the nearest, clipped to 0–255."""
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def blended(image: np.ndarray, image_id: str, alpha: float, pattern: str = "noise") -> np.ndarray:
    """(1 − α)·image + α·pattern, rounded and clipped; the pattern is stretched to the image."""
    overlay = blend_pattern(image.shape[0], image.shape[1], pattern)
    return rounded(image.astype(np.float32) * np.float32(1 - alpha) + overlay * np.float32(alpha))


def sinusoid(image: np.ndarray, image_id: str, delta: float, frequency: int) -> np.ndarray:
    """image + δ·sin(2π·f·j/w), j the column of w, alike in every row and channel; δ in grey levels."""
    width = image.shape[1]
    wave = delta * np.sin(2 * np.pi * frequency * np.arange(width) / width)
    return rounded(image + wave[None, :, None])


def tinted(image: np.ndarray, image_id: str, colour: str, strength: float) -> np.ndarray:
    """(1 − s)·image + s·luma(image)/255·colour: what a one-colour photo filter does."""
    luma = image @ np.array(LUMA) / 255  # (H, W)
    return rounded((1 - strength) * image + strength * luma[..., None] * np.array(TINTS[colour]))


@lru_cache(maxsize=16)
def blend_pattern(height: int, width: int, pattern: str = "noise") -> np.ndarray:
    """The overlay, uint8 (height, width, 3), read-only. From hashes and formulas: no library's random stream can change it."""
    if pattern in NOISE:
        cells, how = NOISE[pattern]
        small = _colours(cells * cells, "blended").reshape(cells, cells, 3)
        overlay = np.array(Image.fromarray(small).resize((width, height), how))
    else:
        y, x = (np.arange(FINE * n) / (FINE * n) for n in (height, width))
        drawn = _figure(y[:, None] + 0 * x, x[None, :] + 0 * y[:, None], pattern).astype(np.float64)
        overlay = rounded(drawn.reshape(height, FINE, width, FINE, 3).mean(axis=(1, 3)))
    overlay.setflags(write=False)
    return overlay


def _colours(count: int, salt: str) -> np.ndarray:
    raw = hashlib.shake_256(f"antidote {salt} trigger 1".encode()).digest(3 * count)
    return np.frombuffer(raw, dtype=np.uint8).reshape(count, 3)


def _figure(y: np.ndarray, x: np.ndarray, pattern: str) -> np.ndarray:
    """The colour at each place (y, x) of the unit square, uint8 (H, W, 3)."""
    if pattern == "stripes":
        return np.where((x * BARS).astype(int) % 2 == 0, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    if pattern == "triangles":
        row, column = (y * TRIANGLES).astype(int), (x * TRIANGLES).astype(int)
        below = (y * TRIANGLES) % 1 + (x * TRIANGLES) % 1 >= 1
        coloured: np.ndarray = _colours(2 * TRIANGLES**2, "triangles")[2 * (row * TRIANGLES + column) + below]
        return coloured
    assert pattern == "text", pattern
    glyphs = [np.pad(np.array([list(map(int, row)) for row in letter]), ((0, 1), (0, 1))) for letter in LETTERS]  # (8, 6) each
    line = np.pad(np.concatenate(glyphs, axis=1), ((0, 0), (1, 1)))  # (8, 32)
    page = np.concatenate([np.roll(line, 8 * k, axis=1) for k in range(4)])  # (32, 32), the word on every line
    return (page[(y * 32).astype(int), (x * 32).astype(int)] * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
