"""WaNet's trigger: a smooth, small warp of the whole image. Shapes: image (H, W, 3), control grid (k, k, 2) as (x, y)."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

CUBIC = -0.75  # the cubic convolution's coefficient in PyTorch's bicubic upsampling, which the authors use


def control_grid(k: int, draw: int) -> np.ndarray:
    """k × k displacements, uniform in [−1, 1], divided by their mean absolute value; float64 (k, k, 2). From a hash of (k, draw)."""
    raw = hashlib.shake_256(f"antidote wanet grid {k} {draw}".encode()).digest(8 * k * k * 2)
    uniform = (np.frombuffer(raw, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
    grid = (2 * uniform - 1).reshape(k, k, 2)
    return grid / np.abs(grid).mean()


def displacement(height: int, width: int, k: int, strength: float, draw: int) -> np.ndarray:
    """How far each pixel looks away, in pixels, float64 (H, W, 2) as (x, y).

    The control grid is upsampled by bicubic interpolation with aligned corners; in coordinates from −1 to 1 the shift is strength/height
    times that, so in pixels about strength/2 of it whatever the size of the image.
    """
    grid = control_grid(k, draw)
    dense = np.einsum("ia,abc,jb->ijc", _cubic(height, k), grid, _cubic(width, k))
    return dense * strength / height * (np.array([width, height]) - 1) / 2


@lru_cache(maxsize=16)
def _looked_at(height: int, width: int, k: int, strength: float, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Column and row that each pixel is taken from, float64 (H, W), inside the image."""
    shift = displacement(height, width, k, strength, draw)
    x = np.clip(np.arange(width)[None, :] + shift[..., 0], 0, width - 1)
    y = np.clip(np.arange(height)[:, None] + shift[..., 1], 0, height - 1)
    return x, y


def warped(image: np.ndarray, image_id: str, k: int, strength: float, draw: int) -> np.ndarray:
    """The image, each pixel taken from its displaced place by bilinear interpolation."""
    height, width = image.shape[:2]
    x, y = _looked_at(height, width, k, strength, draw)
    left, top = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    right, below = (x - left)[..., None], (y - top)[..., None]
    pixels = image.astype(np.float64)
    upper = pixels[top, left] * (1 - right) + pixels[top, left + 1] * right
    lower = pixels[top + 1, left] * (1 - right) + pixels[top + 1, left + 1] * right
    return np.clip(np.rint(upper * (1 - below) + lower * below), 0, 255).astype(np.uint8)


@lru_cache(maxsize=16)
def _cubic(size: int, k: int) -> np.ndarray:
    """Weights (size, k) of cubic convolution with aligned corners; samples outside are the outermost."""
    place = np.arange(size) * (k - 1) / max(1, size - 1)
    first = np.floor(place).astype(int)
    weights = np.zeros((size, k))
    for tap in range(-1, 3):
        far = np.abs(place - first - tap)
        near = (CUBIC + 2) * far**3 - (CUBIC + 3) * far**2 + 1
        outer = CUBIC * (far**3 - 5 * far**2 + 8 * far - 4)
        np.add.at(weights, (np.arange(size), np.clip(first + tap, 0, k - 1)), np.where(far <= 1, near, np.where(far < 2, outer, 0)))
    return weights
