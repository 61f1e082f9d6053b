"""CleanCLIP: repair a poisoned model on trusted pairs, with a loss that also compares each side with a view of itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.augmented import Augmented
from defenses.base import Batch, ClipOutput, LossFn, Repair


@dataclass(frozen=True)
class CleanCLIP(Augmented):
    """Train without defence, then fine-tune on trusted pairs until images and captions forget the trigger that ties them.

    Source: Bansal, Singhi, Yang, Yin, Grover & Chang, "CleanCLIP: Mitigating Data Poisoning Attacks in Multimodal Contrastive
        Learning", ICCV 2023, arXiv 2303.03323; released code nishadsinghi/CleanCLIP.
    Assumes: trusted data. In a run they are pairs of the training set that the attack is known not to have touched, which nobody
        knows outside of an experiment; `antidote repair CHECKPOINT --clean DATA` takes a set of your own.
    Cost: after training, `epochs` passes over the trusted pairs, two views each: about twice what a pass of plain CLIP takes.
    Parameters (and those of `Augmented`, for the second view; the first view and all of the training are not augmented):
        clean: trusted pairs, a count or a share of the unpoisoned ones, chosen by hash (paper 100,000 of 3 M; ours .1).
        epochs: passes over them (paper 10).
        batch: pairs a step (paper 64).
        lr: peak learning rate of the repair (paper 1e-5, for models trained at 5e-4 on 3 M pairs).
        warmup: optimiser steps of linear warm-up, then cosine to 0 (paper 50).
        weight_decay: of the repair (paper .1).
        cross: weight of the CLIP loss between image and caption, w_c (paper 1).
        inner: weight of the contrastive losses between each side and its own second view, w_i (paper 1).
    Limits: everything rests on the trusted pairs: poison among them is learnt. Too low a learning rate leaves the backdoor, too high
        a one costs accuracy; a small model on few pairs needs another one than the paper's. The views are RoCLIP's, not the
        released code's. Third parties report that blended and optimised triggers survive it in part.
    """

    clean: int | float = 0.1
    epochs: int = 10
    batch: int = 64
    lr: float = 1e-5
    warmup: int = 50
    weight_decay: float = 0.1
    cross: float = 1.0
    inner: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.clean, float)
        if not (0 < self.clean <= 1 if share else self.clean >= 2):
            raise ValueError(f"clean={self.clean}: give a share above 0 and up to 1, or a whole number from 2")
        for name, least in (("epochs", 1), ("batch", 2), ("warmup", 0), ("weight_decay", 0), ("cross", 0), ("inner", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give {least} or more")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: give a learning rate above 0")
        if not self.cross + self.inner:
            raise ValueError("cross=0 and inner=0 leave nothing to learn: give one of them")

    def augment(self, batch: Batch) -> Batch:
        return batch

    def repair(self) -> Repair:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Repair(Repairing(**values), self.clean, self.epochs, self.batch, self.lr, self.warmup, self.weight_decay)


class Repairing(CleanCLIP):
    """CleanCLIP at work: the second view is augmented, the loss compares both."""

    @property
    def view_count(self) -> int:
        return 2

    def augment(self, batch: Batch) -> Batch:
        return Augmented.augment(self, batch) if batch.view else batch

    def loss(self, out: ClipOutput, base: LossFn) -> Tensor:
        """w_c·L_CLIP + w_i·½[CE(s·I·I'ᵀ) + CE(s·T·T'ᵀ)], rows against the diagonal; primes: the second view. Scalar."""
        assert out.image_b is not None and out.text_b is not None
        own = torch.arange(len(out.image), device=out.image.device)
        sides = ((out.image, out.image_b), (out.text, out.text_b))
        inner = sum(F.cross_entropy(out.scale * view @ other.T, own) for view, other in sides) / 2
        return self.cross * base(out) + self.inner * inner
