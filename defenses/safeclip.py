"""SafeCLIP: let captions teach only the pairs that already agree; the others teach each side by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.augmented import Augmented
from defenses.base import ClipOutput, LossFn, Selection, Selector, check_pool_size

ITERATIONS, TOLERANCE = 500, 1e-7  # of the mixture's fit: at most, and the gain in mean log-likelihood that ends it
FLOOR = 1e-4  # smallest variance of a component, as a share of the whole


@dataclass(frozen=True)
class SafeCLIP(Augmented):
    """Learn each side by itself first, then let captions teach the pairs that agree, a few more each epoch.

    Source: Yang, Gao & Mirzasoleiman, "Better Safe than Sorry: Pre-training CLIP against Targeted Data Poisoning and Backdoor
        Attacks", ICML 2024, arXiv 2310.05862; released code BigML-CS-UCLA/SafeCLIP.
    Assumes: after a short training, mostly of each side by itself, poisoned pairs agree less than most clean ones. No clean data is
        needed.
    Cost: two augmented views of every batch in all epochs, so about twice the training time; one forward pass over all pairs before
        each epoch after the first warmup + bridge.
    Parameters (and those of `Augmented`, for both views):
        warmup: first epochs, in which captions teach images nothing: each side learns from neighbours of its own kind (paper 5).
        bridge: CLIP epochs on all pairs after them, at a low rate (paper 1; small sets need more, their epochs are a few dozen steps).
        slow: the learning rate of these epochs, times the schedule's (paper .01, as a constant rate).
        pool_size: latest pairs among which neighbours are looked for, a count or a share (paper about .02).
        posterior: pairs whose posterior of agreeing is at least this form the first safe set (paper .9).
        least: smallest share of all pairs that is safe, where no posterior is that high: the two groups overlap then (ours .05).
        growth: share of all pairs by which the safe set grows each epoch (paper .01; at .05 the authors' attack succeeds again).
        most: largest share of all pairs that is safe (paper .85).
    Limits: honest pairs that agree badly teach their captions late or never. If an attack is learnt in the bridge already, its
        pairs are the ones that agree best: raise warmup, or lower slow. Differs from the released code: pairs of equal neighbours
        are no negatives of each other (so rows that all choose one neighbour lose nothing, and only the pool's variety keeps them
        from it); a pair that agrees better never has the smaller posterior, whatever the two variances; ranks are by cosine;
        the safe share is in the checkpoint, and the latest pairs' features too; the epoch takes the risky pairs first, then the safe
        ones, with one mixed batch between.
    """

    warmup: int = 5
    bridge: int = 1
    slow: float = 0.01
    pool_size: int | float = 0.02
    posterior: float = 0.9
    least: float = 0.05
    growth: float = 0.01
    most: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup", "bridge"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 epoch or more")
        if self.slow <= 0:
            raise ValueError(f"slow={self.slow}: give a factor of the learning rate above 0")
        check_pool_size(self.pool_size)
        for name in ("posterior", "most"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share above 0 and up to 1")
        if not 0 <= self.least <= self.most:
            raise ValueError(f"least={self.least}: give a share from 0 to most={self.most}")
        if not 0 <= self.growth <= 1:
            raise ValueError(f"growth={self.growth}: give a share from 0 to 1")

    @property
    def view_count(self) -> int:
        return 2

    @property
    def queue_size(self) -> int | float:
        return self.pool_size

    def lr_factor(self, epoch: int) -> float:
        return self.slow if self.warmup < epoch <= self.warmup + self.bridge else 1.0

    def selector(self, epoch: int) -> Selector | None:
        return MixtureSelector(self.posterior, self.growth, self.most, self.least) if epoch > self.warmup + self.bridge else None

    def loss(self, out: ClipOutput, base: LossFn) -> Tensor:
        if out.epoch <= self.warmup:
            return unimodal(out)
        if out.safe is None:
            return crossed(out)
        safe, count = out.safe, int(out.safe.sum())
        if count < 2 or len(safe) - count < 2:  # a contrast needs two pairs
            return unimodal(out) if count < 2 else crossed(_rows(out, safe))
        return (count * crossed(_rows(out, safe)) + (len(safe) - count) * unimodal(_rows(out, ~safe))) / len(safe)


def unimodal(out: ClipOutput) -> Tensor:
    """½ Σ over both sides of CE(s·b·NN(a)ᵀ), rows against the diagonal: a, b two views, NN(a) the neighbour of a in the queue. Scalar.

    Neighbours carry no gradient. While the queue is empty a is its own. Rows that share a neighbour are no negatives of each other.
    """
    assert out.image_b is not None and out.text_b is not None
    own = torch.arange(len(out.image), device=out.image.device)
    total = out.image.new_zeros(())
    for a, b, queue in ((out.image, out.image_b, out.image_queue), (out.text, out.text_b, out.text_queue)):
        near = neighbours(a.detach().float(), queue)
        logits = out.scale * b @ near.T
        twin = (near @ near.T > 1 - 1e-6).fill_diagonal_(False)
        total = total + F.cross_entropy(logits.masked_fill(twin, -torch.inf), own) / 2
    return total


def neighbours(features: Tensor, queue: Tensor | None) -> Tensor:
    """(N, d): of each row of features (N, d) the row of largest cosine in queue (Q, d)."""
    if queue is None or not len(queue):
        return features
    return queue[(features @ queue.T).argmax(1)]


def crossed(out: ClipOutput) -> Tensor:
    """½[CE(s·I_a·T_bᵀ) + CE(s·T_a·I_bᵀ)], a and b two views. Scalar."""
    assert out.image_b is not None and out.text_b is not None
    own = torch.arange(len(out.image), device=out.image.device)
    ways = (out.image @ out.text_b.T, out.text @ out.image_b.T)
    return (F.cross_entropy(out.scale * ways[0], own) + F.cross_entropy(out.scale * ways[1], own)) / 2


def _rows(out: ClipOutput, kept: Tensor) -> ClipOutput:
    assert out.image_b is not None and out.text_b is not None
    return replace(out, image=out.image[kept], text=out.text[kept], image_b=out.image_b[kept], text_b=out.text_b[kept])


@dataclass(frozen=True)
class MixtureSelector:
    """The pairs of highest cosine: at first those of a high posterior, later as many as before and a few more."""

    posterior: float
    growth: float
    most: float
    least: float

    def split(self, cosine: np.ndarray, before: float | None) -> Selection:
        """cosine (N,); among equal cosines the earlier row. From `least` to `most` of the pairs are safe, and two in any case."""
        count = len(cosine)
        agrees = posteriors(cosine)
        wanted = int((agrees >= self.posterior).sum()) if before is None else round((before + self.growth) * count)
        if before is not None and self.growth:  # by one pair at least: a small set would never grow
            wanted = max(wanted, int(before * count + 1e-6) + 1)
        wanted = max(2, min(max(wanted, round(self.least * count)), int(self.most * count)))
        safe = np.zeros(count, dtype=bool)
        safe[np.argsort(-cosine, kind="stable")[:wanted]] = True  # the posterior never falls as the cosine rises
        return Selection(safe, agrees.astype(np.float32), wanted / count)


def posteriors(x: np.ndarray) -> np.ndarray:
    """(N,): for each of x (N,) the posterior of the higher of two Gaussians fitted to them, made to rise with x.

    With unequal variances the wider component takes both tails: far below the lower mean (or far above the higher one) the posterior
    turns round. There it keeps the value of the turning point, which lies outside of the two means. 0 where all x are equal: nothing tells
    pairs that agree from others.
    """
    x = x.astype(np.float64)
    if x.std() < 1e-12:
        return np.zeros(len(x))
    weight, mean, variance = fit_mixture(x)
    bend = 1 / variance[0] - 1 / variance[1]
    if abs(bend) > 1e-12:
        turn = (mean[0] / variance[0] - mean[1] / variance[1]) / bend
        x = np.maximum(x, turn) if bend > 0 else np.minimum(x, turn)
    log = np.log(weight) - 0.5 * np.log(variance) - (x[:, None] - mean) ** 2 / (2 * variance)
    return 1 / (1 + np.exp(np.clip(log[:, 0] - log[:, 1], -700, 700)))


def fit_mixture(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means (ascending) and variances (2,) each of two Gaussians, by expectation maximisation from the halves of x (N,)."""
    upper = x > np.median(x)
    upper = upper if upper.any() else x >= np.median(x)
    belongs = np.stack([~upper, upper], axis=1).astype(np.float64)
    floor, last = FLOOR * x.var(), -np.inf
    for _ in range(ITERATIONS):
        mass = np.maximum(belongs.sum(0), 1e-9)
        mean = belongs.T @ x / mass
        variance = (belongs * (x[:, None] - mean) ** 2).sum(0) / mass + floor
        weight = mass / mass.sum()
        log = np.log(weight) - 0.5 * np.log(2 * np.pi * variance) - (x[:, None] - mean) ** 2 / (2 * variance)
        whole = np.logaddexp(log[:, 0], log[:, 1])
        belongs = np.exp(log - whole[:, None])
        if whole.mean() - last < TOLERANCE:
            break
        last = whole.mean()
    order = np.argsort(mean)
    return weight[order], mean[order], variance[order]
