"""Where the main object of an image is: supplied masks, the scenes' own, or a simple saliency step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from orchestrate.data import scenes

BORDER = 0.06  # width of the frame whose colours count as background, as a share of the side
COLOURS = 6  # kinds of border colour


def from_folder(folder: str, ids: Sequence[str], side: int) -> np.ndarray:
    """`folder`/ID.png of each image, bool (n, S, S): true where brighter than half. ValueError for one that is missing or no mask."""
    root = Path(folder).expanduser().resolve()
    found = np.zeros((len(ids), side, side), bool)
    for number, identifier in enumerate(ids):
        file = (root / f"{identifier}.png").resolve()
        if not file.is_relative_to(root) or not file.is_file():
            raise ValueError(f"no mask {identifier}.png in {root}: give one for each image, or leave `masks` empty.")
        with Image.open(file, formats=("PNG",)) as image:
            if max(image.size) > 8192:
                raise ValueError(f"{file} is {image.width} × {image.height} px: a mask needs no more than its image.")
            short = min(image.size)
            left, top = (image.width - short) / 2, (image.height - short) / 2  # the centre square, as images are read
            grey = image.convert("L").resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
        found[number] = np.asarray(grey) >= 128
    return found


def of_scenes(seed: int, ids: Sequence[str], drawn: int, side: int) -> np.ndarray:
    """The exact masks of built-in scenes drawn at `drawn` px, at the stored side, bool (n, S, S)."""
    found = np.zeros((len(ids), side, side), bool)
    for number, identifier in enumerate(ids):
        mask = scenes.scene(seed, scenes.scene_index(identifier), drawn).mask
        grey = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
        found[number] = np.asarray(grey) >= 128
    return found


def salient(images: np.ndarray) -> np.ndarray:
    """A guess, bool (n, S, S), of uint8 (n, S, S, 3): the largest connected region whose colours are unlike the border's.

    Colours of the border are grouped (k-means); distance to the nearest group, parted by Otsu's threshold; holes are filled. It fails
    where the object reaches the border or has the background's colours; then the mask is small or large, and users leave it out.
    """
    return np.stack([_salient(image) for image in images]) if len(images) else np.zeros((0, 1, 1), bool)


def _salient(image: np.ndarray) -> np.ndarray:
    from scipy import ndimage
    from scipy.cluster.vq import kmeans2

    side = len(image)
    frame = np.ones((side, side), bool)
    inner = max(1, round(BORDER * side))
    frame[inner:-inner, inner:-inner] = False
    pixels = image.astype(np.float64)
    centres, _ = kmeans2(pixels[frame], COLOURS, minit="++", rng=np.random.default_rng(0))
    distance = np.sqrt(((pixels[:, :, None] - centres) ** 2).sum(3)).min(2)
    distance = ndimage.gaussian_filter(distance, side / 64)
    region, count = ndimage.label(distance > _otsu(distance))
    if not count:
        return np.zeros((side, side), bool)
    largest = 1 + int(np.argmax(np.bincount(region.ravel())[1:]))
    return np.asarray(ndimage.binary_fill_holes(region == largest), dtype=bool)


def _otsu(values: np.ndarray) -> float:
    """The threshold that leaves the least variance within the two parts (Otsu 1979)."""
    counts, edges = np.histogram(values, 64)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    low = np.cumsum(counts * middle)[:-1] / np.maximum(below, 1)
    high = ((counts * middle).sum() - np.cumsum(counts * middle)[:-1]) / np.maximum(above, 1)
    return float(edges[1 + int(np.argmax(below * above * (low - high) ** 2))])
