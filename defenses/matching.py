"""For each image its caption in a pool: the nearest by cosine; the nearest by transport is `transport_nearest`, from a file of its own.

Similarities are computed in tiles, so memory is bounded by `block`², whatever the number of images and captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.base import Features, Match, Matcher
from defenses.transport_matching import transport_nearest as transport_nearest


@torch.no_grad()
def nearest(images: Tensor, pool: Tensor, *, exclude: Tensor | None = None, block: int = 4096) -> Match:
    """arg max_j cos(images_i, pool_j); among equal cosines the lowest j; distance = 1 − cosine.

    images (N, d), pool (M, d), any length but zero, both on one device; computed in float32.
    exclude (N,) int64: a pool row that image must not get, −1 for none. block: rows and columns of a tile.
    Captions whose cosines differ by rounding only (about 1e-7) may be told apart differently on another device or tiling.
    Raises ValueError where an image has no caption left, or where features hold NaN.
    """
    if images.ndim != 2 or pool.ndim != 2 or images.shape[1] != pool.shape[1]:
        raise ValueError(f"images {tuple(images.shape)} and pool {tuple(pool.shape)}: give (N, d) and (M, d)")
    if not len(pool):
        raise ValueError("the pool is empty: raise pool_size")
    if exclude is not None and exclude.shape != images.shape[:1]:
        raise ValueError(f"exclude {tuple(exclude.shape)}: give one pool row, or -1, for each of {len(images)} images")
    index = torch.empty(len(images), dtype=torch.int64, device=images.device)
    cosine = torch.empty(len(images), dtype=torch.float32, device=images.device)
    captions = F.normalize(pool.float(), dim=1)
    for low in range(0, len(images), block):
        rows = slice(low, low + block)
        left_out = None if exclude is None else exclude[rows].to(images.device)
        cosine[rows], index[rows] = _best_in_pool(F.normalize(images[rows].float(), dim=1), captions, left_out, block)
    if not bool(torch.isfinite(cosine).all()):
        raise ValueError(
            "an image has no caption to match: the pool holds nothing but its excluded row (raise pool_size), "
            "or features hold NaN (lower the learning rate)"
        )
    return Match(index, 1 - cosine)


def _best_in_pool(images: Tensor, pool: Tensor, exclude: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Unit rows images (n, d), pool (M, d), exclude (n,) → the best cosine (n,), −inf if there is none, and its row."""
    best = images.new_full((len(images),), -torch.inf)
    index = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for low in range(0, len(pool), block):
        cosine = images @ pool[low : low + block].T
        if exclude is not None:
            inside = ((exclude >= low) & (exclude < low + cosine.shape[1])).nonzero()[:, 0]
            cosine[inside, exclude[inside] - low] = -torch.inf
        value, column = cosine.max(1)  # the first of equals
        better = (value > best) | value.isnan()  # not ≥: an earlier tile keeps a tie; NaN must come to light
        best = torch.where(better, value, best)
        index = torch.where(better, column + low, index)
    return best, index


def staying(nearer: np.ndarray, gap: np.ndarray, move: float) -> np.ndarray:
    """Which pairs keep their own caption, bool (N,): all but `move` of them, those for which most of the pool is `nearer` (N,).

    Of equals those go first whose own caption is farther behind the pool's nearest, by `gap` (N,); where it is not behind at all it stays.
    """
    worst = np.lexsort((gap, nearer))[::-1][: round(move * len(nearer))]
    stays = np.ones(len(nearer), dtype=bool)
    stays[worst] = gap[worst] <= 0
    return stays


def cosines(images: Tensor, captions: Tensor) -> Tensor:
    """Cosine (N,) of each image (N, d) and its caption (N, d)."""
    return (F.normalize(images.float(), dim=1) * F.normalize(captions.float(), dim=1)).sum(1)


@torch.no_grad()
def share_nearer(images: Tensor, pool: Tensor, cosine: Tensor, *, block: int = 4096) -> Tensor:
    """Share of the pool (M, d) whose cosine with the image exceeds `cosine` (N,) by more than rounding (1e-6). float32 (N,).

    The rank of a caption in units of the pool: for a caption that has nothing to do with its image it is uniform on [0, 1], whatever the
    scale of the cosines, which differs from epoch to epoch and from set to set.
    """
    captions = F.normalize(pool.float(), dim=1)
    count = torch.zeros(len(images), device=images.device)
    for low in range(0, len(images), block):
        rows = F.normalize(images[low : low + block].float(), dim=1)
        for some in captions.split(block):
            count[low : low + block] += (rows @ some.T > cosine[low : low + block, None] + 1e-6).sum(1)
    return count / len(pool)


@dataclass(frozen=True)
class CosineMatcher:
    """RoCLIP's matcher: the caption whose pooled feature has the largest cosine with the image's.

    With `move` below 1 only that share of all pairs is re-paired; `match` then measures each image's own caption too.
    """

    pool_size: int | float = 0.02
    matched: Literal["embedding", "caption"] = "embedding"
    tokens: bool = False
    look: float = 0.0
    move: float = 1.0
    block: int = 4096

    name = "cosine"  # class constant

    @property
    def beside(self) -> Mapping[str, Matcher]:
        return {}

    def match(self, images: Features, pool: Features, own: Features | None = None) -> Match:
        """own: features (N, d) of each image's own caption, where `move` is below 1."""
        found = nearest(images.pooled, pool.pooled, block=self.block)
        if own is None:
            return found
        cosine = cosines(images.pooled, own.pooled)
        return found._replace(own_distance=1 - cosine, nearer=share_nearer(images.pooled, pool.pooled, cosine, block=self.block))
