"""RoCLIP: in every K-th epoch each image learns from the caption nearest to it in a random pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from defenses.augmented import Augmented
from defenses.base import Matcher, check_pool_size
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
        move: share of all pairs that a robust epoch re-pairs (paper 1: every one). Below 1 (ours) those move whose own caption ranks
            worst, by the share of the pool that is nearer to the image; the others keep theirs. Until it is learnt a poisoned caption
            ranks like any other of the pool, a clean one soon among the first, whatever the scale of the cosines; so give several
            times the poison rate you fear. Needs matched="caption".
        look: sigma, in px of a 224 px image, of a blur through which matching looks at the images (paper 0: none). A trigger of fine
            detail does not pass (ours): its image then ranks its caption as if it had none, however well the trigger has been learnt.
    Limits: right after a robust epoch image-text cosines can collapse and recover one epoch later, so compare methods
        at an epoch of the same kind. Third parties report that structured triggers (patches, stripes) keep an attack
        success of 75-82 %. Differs from the released code: its pool is a ring buffer in loader order that starts as
        noise and is lost on resume; ours is drawn at random and encoded with the weights of the moment.
    """

    every: int = 2
    pool_size: int | float = 0.02
    matched: Literal["embedding", "caption"] = "embedding"
    warmup: int = 0
    move: float = 1.0
    look: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every={self.every}: give 1 (every epoch is robust) or more")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: give the number of plain epochs to begin with, 0 or more")
        if self.matched not in ("embedding", "caption"):
            raise ValueError(f'matched={self.matched!r}: give "embedding" or "caption"')
        if not 0 < self.move <= 1:
            raise ValueError(f"move={self.move}: give the share of pairs to re-pair, above 0 and up to 1")
        if self.move < 1 and self.matched != "caption":
            raise ValueError(f'move={self.move}: needs matched="caption", as a caption that stays is encoded again')
        if self.look < 0:
            raise ValueError(f"look={self.look}: give the blur's sigma in px at 224 px, 0 for none")
        check_pool_size(self.pool_size)

    def robust(self, epoch: int) -> bool:
        return epoch > self.warmup and epoch % self.every == 0

    def matcher(self, epoch: int) -> Matcher | None:
        if not self.robust(epoch):
            return None
        return CosineMatcher(self.pool_size, self.matched, look=self.look, move=self.move)
