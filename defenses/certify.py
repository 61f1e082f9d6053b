"""Certificates: how many poisoned examples of a labelled set a classifier by votes provably withstands, under a fixed encoder.

Poisoning size e: labelled examples added, removed or changed (features and labels at will). Votes of m test points over C classes are
(m, C) counts; ties go to the smaller class; a point without any vote abstains, prediction −1, which counts as wrong.

    kNN   the k nearest labelled examples vote, the earlier of equals: e changes replace at most e voters
    rNN   all labelled examples within a radius vote: e changes remove at most e votes and add at most e
    DPA   heads fitted on disjoint shards vote: e changes alter at most e heads, if an example's shard depends on itself alone (where it
          depends on the image, an image that is changed counts twice: it leaves one shard and joins another)

Similarities are taken for exact: an attacker who decides how float32 rounds two of them is not considered.

Source: Jia, Liu, Cao & Gong, "Certified Robustness of Nearest Neighbors against Data Poisoning and Backdoor Attacks", AAAI 2022,
arXiv 2012.03765; Levine & Feizi, "Deep Partition Aggregation", ICLR 2021, arXiv 2006.14768.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

SCOPE = (
    "Scope: poisoning of the labelled set of the downstream classifier (examples added, removed or changed; to the heads of shards an "
    "image exchanged for another counts as two), under this fixed encoder, for k and radius that do not follow from the labelled set. "
    "It says nothing of poison among the pairs that the encoder was trained on."
)
BLOCK = 2**24  # similarities held at once
ABSTAINS = -1


def knn_votes(train: Tensor, labels: np.ndarray, test: Tensor, k: int, classes: int) -> np.ndarray:
    """Labels of the k most similar rows (cosine) → (m, C) int64. train (n, d), test (m, d) unit norm, labels (n,) in [0, C).

    Of equally similar rows the earlier one is nearer: without an order of all rows, one that is taken away could exchange all voters
    among its equals. ValueError unless 0 < k ≤ n.
    """
    if not 0 < k <= len(train):
        raise ValueError(f"k={k}: give a number of neighbours from 1 to the {len(train):,} labelled examples")
    votes = np.zeros((len(test), classes), dtype=np.int64)
    for rows, similar in _similar(train, test):
        last = similar.topk(k, dim=1).values[:, -1:]
        nearer, equal = similar > last, similar == last
        voters = (nearer | (equal & (equal.cumsum(1, dtype=torch.int32) <= k - nearer.sum(1, keepdim=True)))).cpu().numpy()
        for label in range(classes):
            votes[rows, label] = voters[:, labels == label].sum(1)
    return votes


def rnn_votes(train: Tensor, labels: np.ndarray, test: Tensor, radius: float, classes: int) -> np.ndarray:
    """Labels of all rows within `radius` (1 − cosine) → (m, C) int64; a point may have none."""
    votes = np.zeros((len(test), classes), dtype=np.int64)
    for rows, similar in _similar(train, test):
        near = (1 - similar <= radius).cpu().numpy()
        for label in range(classes):
            votes[rows, label] = near[:, labels == label].sum(1)
    return votes


def _similar(train: Tensor, test: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, BLOCK // max(1, len(train)))
    for low in range(0, len(test), step):
        yield slice(low, low + step), test[low : low + step] @ train.T


def predictions(votes: np.ndarray) -> np.ndarray:
    """(m,) int64: the class of most votes, the smaller of equals; ABSTAINS without votes."""
    return np.where(votes.sum(1) > 0, votes.argmax(1), ABSTAINS)


def radii(votes: np.ndarray) -> np.ndarray:
    """(m,) int64: e*, the largest poisoning size that provably leaves the prediction; −1 where it abstains.

    kNN and rNN: min over b ≠ a of ⌈(s_a − s_b + 1[a < b]) / 2⌉ − 1; each changed example moves at most one vote from a to b. The same for
    heads of shards, ⌊(s_a − max_b(s_b + 1[b < a])) / 2⌋, is the same number.
    """
    m, classes = votes.shape
    if classes < 2:
        raise ValueError("a certificate needs two classes or more")
    a = votes.argmax(1)
    lead = votes[np.arange(m), a][:, None] - votes + (a[:, None] < np.arange(classes))
    lead[np.arange(m), a] = np.iinfo(np.int64).max // 4
    best = (lead.min(1) + 1) // 2 - 1
    return np.where(votes.sum(1) > 0, best, -1)


def individual(votes: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(len(sizes),): share of test points that are right and provably stay so, each attacked on its own."""
    right = predictions(votes) == labels
    found = radii(votes)
    return np.array([(right & (found >= e)).mean() for e in sizes])


def costs(votes: np.ndarray) -> np.ndarray:
    """(m,): g_i = s_a − max_{l≠a}(s_l + 1[l < a]) + 1. With e changes, point i falls only if g_i − e of them remove votes for its class."""
    m, classes = votes.shape
    a = votes.argmax(1)
    rivals = votes + (np.arange(classes) < a[:, None])
    rivals[np.arange(m), a] = np.iinfo(np.int64).min // 4
    return votes[np.arange(m), a] - rivals.max(1) + 1


def hold_together(cost: np.ndarray, size: int) -> int:
    """Of rNN points with pairwise different predicted classes and costs g (m,): how many any one poisoning of `size` must leave.

    A removed or changed example has one label, so it removes a vote from the class of one point of the group only: those that fall share
    the removals, Σ max(g_i − e, 0) ≤ e, and the cheapest fall first.
    """
    needed = np.cumsum(np.maximum(np.sort(cost) - size, 0))
    return len(cost) - int((needed <= size).sum())


def joint(votes: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(len(sizes),): share of test points that provably stay right when one poisoning attacks all of them. rNN votes only.

    Points are grouped one of each class, those of like cost together. In a group either certificate holds, so the better one counts.
    """
    right = np.flatnonzero(predictions(votes) == labels)
    cost, single = costs(votes), radii(votes)
    groups: dict[int, list[int]] = {}
    for label in np.unique(labels[right]):
        own = right[labels[right] == label]
        for place, i in enumerate(own[np.argsort(-cost[own], kind="stable")]):
            groups.setdefault(place, []).append(int(i))
    members = [np.array(group) for group in groups.values()]
    held = [sum(max(hold_together(cost[g], int(e)), int((single[g] >= e).sum())) for g in members) for e in sizes]
    return np.array(held) / len(labels)
