"""For each image its caption in a pool: the nearest by cosine; the nearest by transport is `transport_nearest`, from a file of its own.

Similarities are computed in tiles, so memory is bounded by `block`², whatever the number of images and captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class CosineMatcher:
    """RoCLIP's matcher: the caption whose pooled feature has the largest cosine with the image's.

    With `own` each image's own caption competes too, and stays unless the pool's best is nearer by more than `margin` (cosine).
    """

    pool_size: int | float = 0.02
    matched: Literal["embedding", "caption"] = "embedding"
    tokens: bool = False
    own: bool = False
    margin: float = 0.0
    block: int = 4096

    name = "cosine"  # class constant

    @property
    def beside(self) -> Mapping[str, Matcher]:
        return {}

    def match(self, images: Features, pool: Features, own: Features | None = None) -> Match:
        """own: features (N, d) of each image's own caption, where `self.own`."""
        found = nearest(images.pooled, pool.pooled, block=self.block)
        if own is None:
            return found
        distance = 1 - (F.normalize(images.pooled.float(), dim=1) * F.normalize(own.pooled.float(), dim=1)).sum(1)
        return found._replace(stays=distance <= found.distance + self.margin, own_distance=distance)
