"""RoCLIP: in every K-th epoch each image learns from the caption nearest to it in a random pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from defenses.augmented import Augmented
from defenses.base import Matcher
from defenses.matching import CosineMatcher


@dataclass(frozen=True)
class RoCLIP(Augmented):
    """Break poisoned pairs: in robust epochs an image learns from its nearest caption in a pool, not from its own.

    Source: Yang, Gao & Mirzasoleiman, "Robust Contrastive Language-Image Pretraining against Data Poisoning and
        Backdoor Attacks", NeurIPS 2023, arXiv 2303.06854; released code BigML-CS-UCLA/RoCLIP.
    Assumes: before it is learnt, a poisoned image lies nearer to captions of what it shows than to the adversary's;
        poison is rare enough that a random pool holds few adversarial captions. No clean data is needed.
    Cost: one forward pass over all images and over the pool before each robust epoch, and images × pool cosines.
        In the authors' log robust and plain epochs take the same time.
    Parameters (and those of `Augmented`, all augmentations on in every epoch):
        every: K; epochs K, 2K, … are robust, counted from 1 (paper 2; 1 against strong poisoning).
        pool_size: captions in the pool, a count or a share of the pairs; a fresh sample each time (paper about .02).
        matched: "embedding" (released code): learn from the pool's stored feature, which gives the text encoder no
            gradient in robust epochs; "caption" (the paper's wording): the matched caption is encoded again.
        warmup: first epochs that are never robust (paper 0).
        own: "drawn" (paper): an image's own caption competes only where the pool happens to hold it; "always" (ours): it always
            competes, so that in a robust epoch most clean pairs keep their captions while poisoned ones, whose caption fits the
            image no better than any other until it is learnt, mostly do not. Needs matched="caption".
        margin: own="always": the own caption stays unless the pool's best is nearer by more than this cosine (ours, 0). Larger keeps
            more clean captions, and more poisoned ones.
    Limits: right after a robust epoch image-text cosines can collapse and recover one epoch later, so compare methods
        at an epoch of the same kind. Third parties report that structured triggers (patches, stripes) keep an attack
        success of 75-82 %. Differs from the released code: its pool is a ring buffer in loader order that starts as
        noise and is lost on resume; ours is drawn at random and encoded with the weights of the moment.
    """

    every: int = 2
    pool_size: int | float = 0.02
    matched: Literal["embedding", "caption"] = "embedding"
    warmup: int = 0
    own: Literal["drawn", "always"] = "drawn"
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every={self.every}: give 1 (every epoch is robust) or more")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: give the number of plain epochs to begin with, 0 or more")
        if self.matched not in ("embedding", "caption"):
            raise ValueError(f'matched={self.matched!r}: give "embedding" or "caption"')
        if self.own == "always" and self.matched != "caption":
            raise ValueError('own="always" needs matched="caption": a caption that stays is encoded again, not taken from the pool')
        if not 0 <= self.margin < 2 or (self.margin and self.own != "always"):
            raise ValueError(f'margin={self.margin}: give a cosine from 0 up to 2, and only with own="always"')
        share = isinstance(self.pool_size, float)
        if not (0 < self.pool_size < 1 if share else self.pool_size >= 2):
            raise ValueError(f"pool_size={self.pool_size}: give a share above 0 and below 1, or a whole number from 2")

    def robust(self, epoch: int) -> bool:
        return epoch > self.warmup and epoch % self.every == 0

    def matcher(self, epoch: int) -> Matcher | None:
        if not self.robust(epoch):
            return None
        return CosineMatcher(self.pool_size, self.matched, own=self.own == "always", margin=self.margin)
