"""Suspicion scores: how far a pair stands out among the others, by its image, its caption and how they fit. Larger is more suspicious.

    kdist, slof, dao   local outliers of image embeddings inside a batch (Huang et al., ICLR 2025)
    clip               1 − cosine of image and caption
    nearer             share of a pool's captions that fit the image better than its own, seen sharp or blurred, whichever is worse
    transport          distance of the pair, less that of the image's nearest caption in a pool, as OTCCLIP matches
    conflict, repeats  near-duplicate images whose captions disagree, captions that many pairs share (`defenses.duplicates`)
    words              words of the caption that stand oftener where image and caption fit least (`orchestrate.audit_cause`)
    moved              share of a run's matching rounds that gave the pair another caption

`combine` joins them. None of it is certain: rare honest pairs stand out too, and a model that has learnt the poison finds that it fits.
N pairs, d features, k neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from defenses.base import Features
from defenses.matching import cosines, share_nearer
from defenses.otcclip import OTCCLIP
from defenses.token_pool import TokenPool
from defenses.transport_matching import transport_nearest, transport_pairs

LOOK = 6.0  # sigma, in px of a 224 px image, of the second look at each image (ours): as `defense.look` of the recipes
K = 16  # neighbours, as in Huang et al.'s released code
BATCH = 512  # pairs that are each other's neighbours (ours): poison below k/BATCH = 3 % of the set does not fill its own neighbourhoods
FLOOR = 1e-6  # distances below it count as this: of equal images no ratio would be defined

# Scores of one family see the same thing, so they share one vote.
FAMILIES: dict[str, tuple[str, ...]] = {
    "outlier": ("kdist", "slof", "dao"),
    "pair": ("clip", "nearer", "transport"),
    "conflict": ("conflict",),
    "repeats": ("repeats",),
    "words": ("words",),
    "moved": ("moved",),
}
SCORES = tuple(name for names in FAMILIES.values() for name in names)


def batches(count: int, size: int = BATCH) -> list[tuple[int, int]]:
    """[start, stop) of the batches that `count` pairs are judged in: as even as can be, none smaller than `size` but a lone one."""
    edges = np.linspace(0, count, max(1, count // size) + 1).astype(int).tolist()
    return list(pairwise(edges))


@torch.no_grad()
def neighbours(x: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """Distances (N, k), ascending, and rows (N, k) of each point's nearest others; x (N, d). Euclidean, of unit-norm x.

    ValueError for a batch of k points or fewer.
    """
    if len(x) <= k:
        raise ValueError(f"{len(x)} pairs are too few to have {k} neighbours each: use a larger set")
    unit = F.normalize(x.float(), dim=1)
    # Not by the matrix product: there equal rows would be 1e-4 apart.
    away = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    near = away.topk(k, dim=1, largest=False)
    return near.values.clamp_min(FLOOR), near.indices


def dimensionality(distance: Tensor, ceiling: float) -> Tensor:
    """Local intrinsic dimensionality (N,) by maximum likelihood: −1 / mean_i ln(d_i / d_k), of distances (N, k), at most `ceiling`.

    Source: Amsaleg et al., KDD 2015. Neighbours all equally far away would have an infinite one: the space's own bounds it (ours).
    """
    return (-1 / (distance / distance[:, -1:]).log().mean(1).clamp_max(-FLOOR)).clamp_max(ceiling)


@torch.no_grad()
def outliers(x: Tensor, k: int = K) -> dict[str, Tensor]:
    """kdist, slof and dao, each (N,), of one batch of image embeddings x (N, d).

    kdist  d_k(x), the distance to the k-th nearest
    slof   mean_j d_k(x) / d_k(n_j) over the k neighbours n_j: simplified local outlier factor
    dao    mean_j LID(n_j) · ln(d_k(x) / d_k(n_j)): the same, corrected for the dimension around the neighbours
    Source: Huang et al., "Detecting backdoor samples in contrastive language image pretraining", ICLR 2025; k = 16, in-batch.
    """
    distance, row = neighbours(x, k)
    far = distance[:, -1]
    ratio = far[:, None] / far[row]  # (N, k)
    return {"kdist": far, "slof": ratio.mean(1), "dao": (dimensionality(distance, x.shape[1])[row] * ratio.log()).mean(1)}


def mismatch(images: Tensor, captions: Tensor) -> Tensor:
    """1 − cosine (N,) of images (N, d) and their captions (N, d)."""
    return 1 - cosines(images, captions)


@torch.no_grad()
def nearer(looks: Sequence[Tensor], captions: Tensor, pool: Tensor) -> Tensor:
    """Share of the pool (M, d) nearer to the image than its own caption (N, d): the largest over `looks`, each (N, d). (N,).

    As RoCLIP's `move` ranks pairs (ours): what looks alike in one look only, as a trigger of fine detail does, is not believed.
    """
    return torch.stack([share_nearer(images, pool, cosines(images, captions)) for images in looks]).amax(0)


def transport_excess(images: Features, captions: Features, pool: TokenPool, defense: OTCCLIP | None = None) -> Tensor:
    """Distance of each pair less that of the image's nearest caption in the pool (N,); negative: no caption of the pool fits as well.

    The distance is OTCCLIP's matching distance: the mean of cosine and transport distance, ε = .1, unless `defense` says otherwise.
    """
    how = defense or OTCCLIP()
    assert images.tokens is not None
    found = transport_nearest(images.tokens, pool, epsilon=how.epsilon, weight=how.weight, image_global=images.pooled)
    return transport_pairs(images, captions, epsilon=how.epsilon, weight=how.weight) - found.distance


# --- many scores, one order -------------------------------------------------------------------------------------------------------


def tail(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """For each value the share of the known ones that are at least as large (N,), in (0, 1]. NaN, "unknown", gets 1: it says nothing."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return np.ones(len(values))
    share = (len(known) - np.searchsorted(known, values, side="left")) / len(known)
    return np.where(np.isnan(values), 1.0, share)


def tails(values: NDArray[np.floating], group: NDArray[np.integer] | None) -> NDArray[np.float64]:
    """`tail` among the pairs of the same group (N,), whose scores alone compare."""
    out = np.ones(len(values))
    for rows in [slice(None)] if group is None else [group == one for one in np.unique(group)]:
        out[rows] = tail(values[rows])
    return out


def combine(
    scores: Mapping[str, NDArray[np.floating]],
    families: Mapping[str, Sequence[str]] = FAMILIES,
    group: NDArray[np.integer] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """What each score adds to a pair's suspicion, (N,) each; the suspicion is their sum. group: as in `tails`.

    Rule (ours, Fisher's way of joining tests): −ln of the share of pairs that score at least as much, averaged inside a family,
    summed over families. No weights, so nothing is fitted. Scores that all pairs share add 0; in a family only scores that are there count.
    """
    added = {}
    for names in families.values():
        there = [name for name in names if name in scores]
        for name in there:
            added[name] = -np.log(tails(scores[name], group)) / len(there)
    return added
