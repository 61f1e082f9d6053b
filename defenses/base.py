"""What a defence is: a pairing (which caption each image learns from), an augmentation and a loss.

The trainer calls, in this order, once the model exists:

    for epoch in 1 … epochs:
        if (m := defense.matcher(epoch)):   pairing = actors run m.match(images, pool) over the whole set
        if (s := defense.selector(epoch)):  safe = s.split(cosines that actors compute over the whole set, share of safe pairs so far)
        for batch in epoch:                             # after a split: the other pairs first, then the safe ones
            batch = defense.augment(batch)
            out   = encode(batch)                       # text side from the pairing in a robust epoch
            loss  = defense.loss(out, base)             # base = clip_loss
    if (r := defense.repair()):  fine-tune on r.clean trusted pairs with r.method's augmentation and loss

Every hook of `Defense` means 'leave it alone', so the base class is the undefended baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Features(NamedTuple):
    """Unit-norm features of N images or captions."""

    pooled: Tensor  # (N, d)
    tokens: Tensor | None = None  # (N, P, d), only where a matcher or loss asks for them
    mask: Tensor | None = None  # (N, P) bool, False = padding


class Match(NamedTuple):
    """For each image its nearest caption in the pool, what that took to find, and how its own caption does beside the pool's."""

    index: Tensor  # type: ignore[assignment]  # (N,) int64 into the pool; hides tuple.index
    distance: Tensor  # (N,) float32, to that caption
    solved: Tensor | None = None  # (N,) int64 exact solves
    margin: Tensor | None = None  # (N,) float32: no other caption of the pool is nearer than distance + margin
    own_distance: Tensor | None = None  # (N,) float32, to its own caption, where that was asked for
    nearer: Tensor | None = None  # (N,) float32: share of the pool (or of a sample of it) that is nearer than the own caption


@dataclass(frozen=True)
class Batch:
    """What augmentation sees and returns."""

    images: Tensor  # (N, 3, S, S) float32 in [0, 1], on the training device
    captions: list[str]  # N
    keys: np.ndarray  # (N,) uint64: a random key for each sample of this epoch, the same whatever the number of workers
    view: int = 0  # 0, or 1 for the second view of a defence whose `view_count` is 2
    first: np.ndarray | None = None  # (N,) uint64: for the second view, the keys of the first


@dataclass(frozen=True)
class ClipOutput:
    """The *global* batch on every worker; gradients flow into the local rows only and are summed by the trainer."""

    image: Tensor  # (N, d) unit norm
    text: Tensor  # (N, d) unit norm
    scale: Tensor  # () exp(logit_scale)
    image_tokens: Tensor | None = None  # (N, P, d)
    text_tokens: Tensor | None = None  # (N, L, d)
    text_mask: Tensor | None = None  # (N, L) bool
    image_tokens_b: Tensor | None = None  # (N, P, d) of the second view, where the defence has `view_count` 2
    text_tokens_b: Tensor | None = None  # (N, L', d)
    text_mask_b: Tensor | None = None  # (N, L') bool
    robust: bool = False  # whether the text side comes from a pairing
    image_b: Tensor | None = None  # (N, d) of the second view
    text_b: Tensor | None = None  # (N, d)
    safe: Tensor | None = None  # (N,) bool: what a `Selector` trusts; None: nothing was selected
    image_queue: Tensor | None = None  # (Q, d) of the latest pairs before this batch, first views, without gradient: `queue_size`
    text_queue: Tensor | None = None  # (Q, d)
    epoch: int = 0  # counted from 1
    moved: Tensor | None = None  # (N,) bool: whose text side comes from the pairing; None: no pairing


LossFn = Callable[[ClipOutput], Tensor]


class Matcher(Protocol):
    """What the matching actors need to know; a frozen dataclass of plain values."""

    @property
    def name(self) -> str: ...  # of the measure, as tables of matching quality call it: "cosine", "transport"
    @property
    def beside(self) -> Mapping[str, Matcher]: ...  # others to try on the same features, by name: compared, never learned from
    @property
    def pool_size(self) -> int | float: ...  # captions in the pool: a count, or a share of the training pairs
    @property
    def matched(self) -> str: ...  # "embedding": learn from the pool's stored feature; "caption": re-encode the caption
    @property
    def tokens(self) -> bool: ...  # whether `match` needs token features
    @property
    def look(self) -> float: ...  # sigma, in px of a 224 px image, of the blur through which images are seen; 0: as they are
    @property
    def move(self) -> float: ...  # share of all pairs that are re-paired, those whose own caption does worst; 1: all, without looking at it

    def match(self, images: Features, pool: Features, own: Features | None = None) -> Match: ...


class Selection(NamedTuple):
    """Which pairs are trusted in the epochs to come."""

    safe: np.ndarray  # (N,) bool
    posterior: np.ndarray  # (N,) float32, why: for the record
    share: float  # of all pairs that are safe; the trainer keeps it, saves it in checkpoints and hands it to the next split


class Selector(Protocol):
    """Splits the pairs by how well each image agrees with its own caption; a frozen dataclass of plain values."""

    def split(self, cosine: np.ndarray, before: float | None) -> Selection:
        """cosine (N,) float32 of each pair, `before`: the last split's share, None for the first."""
        ...


class Hardener(Protocol):
    """Changes labelled examples so that a linear probe fitted on them does better on trusted ones."""

    @property
    def where(self) -> str: ...  # "pixels": `harden` is given the images; "features"
    @property
    def penalty(self) -> float: ...  # L2 of the heads compared

    def harden(self, x: Tensor, y: Tensor, valid: Tensor, valid_y: Tensor, classes: int, images: Any | None) -> Tensor: ...


@dataclass(frozen=True)
class Repair:
    """Fine-tuning of a trained model on pairs that are trusted; the rest of the setting is that of the training."""

    method: Defense  # whose augmentation and loss are used
    clean: int | float  # trusted pairs: a count, or a share of the unpoisoned ones
    epochs: int
    batch: int
    lr: float
    warmup: int  # optimiser steps
    weight_decay: float


@dataclass(frozen=True)
class Defense:
    """No defence: plain CLIP, the baseline of every table.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
        arXiv 2103.00020.
    Assumes: that the pairs can be trusted.
    Cost: none.
    Limits: a few poisoned pairs among many are learnt as well as the rest; compare augmented defences with `augmented` too.
    """

    needs_tokens = False  # class constant: whether `loss` reads token features

    @property
    def view_count(self) -> int:
        """Augmented views of a batch that `loss` compares, 1 or 2. With 2, `augment` is called again with other keys."""
        return 1

    @property
    def queue_size(self) -> int | float:
        """Latest pairs whose features `loss` also gets: a count, or a share of the training pairs; 0 = none."""
        return 0

    def matcher(self, epoch: int) -> Matcher | None:
        """Not None: re-pair before this epoch (epochs count from 1)."""
        return None

    def selector(self, epoch: int) -> Selector | None:
        """Not None: score every pair with the weights of the moment and split the set before this epoch. Not where `matcher` is."""
        return None

    def rounds(self, epochs: int) -> list[int]:
        """The epochs before which actors go over the whole set."""
        return [e for e in range(1, epochs + 1) if self.matcher(e) is not None or self.selector(e) is not None]

    def lr_factor(self, epoch: int) -> float:
        """Times the schedule's learning rate."""
        return 1.0

    def repair(self) -> Repair | None:
        """Not None: fine-tune on trusted pairs after training."""
        return None

    def hardener(self) -> Hardener | None:
        """Not None: evaluation also fits a probe on poisoned labels, with and without it."""
        return None

    def augment(self, batch: Batch) -> Batch:
        return batch

    def loss(self, out: ClipOutput, base: LossFn) -> Tensor:
        return base(out)


def clip_loss(out: ClipOutput) -> Tensor:
    """½[CE(s·I·Tᵀ) + CE(s·T·Iᵀ)] over the global batch (Radford et al. 2021). Scalar."""
    logits = out.scale * out.image @ out.text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def check_pool_size(size: int | float) -> None:
    """ValueError unless `size` is a share of the pairs or a count from 2."""
    if not (0 < size < 1 if isinstance(size, float) else size >= 2):
        raise ValueError(f"pool_size={size}: give a share above 0 and below 1, or a whole number from 2")
