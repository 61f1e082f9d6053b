"""CleanCLIP's loss by hand, its views, and what it asks of the trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from defenses.base import Batch, ClipOutput, Defense, clip_loss
from defenses.cleanclip import CleanCLIP


def test_the_loss_by_hand() -> None:
    """Two pairs on axes. CE of [[s, 0], [0, s]] against the diagonal is ln(1 + e^−s); where both rows prefer neither, ln 2."""
    axes, same = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    scale, low = torch.tensor(3.0), math.log(1 + math.exp(-3))
    out = ClipOutput(axes, axes, scale, image_b=axes, text_b=same)
    # Images: their views agree. Captions: both views are the first axis, so row 0 ties at s, row 1 ties at 0.
    work = CleanCLIP(cross=2.0, inner=0.5).repair().method
    assert work.loss(out, clip_loss).item() == pytest.approx(2.0 * low + 0.5 * (low + math.log(2)) / 2, rel=1e-6)
    crossed = ClipOutput(axes, axes.flip(0), scale, image_b=axes, text_b=axes.flip(0))
    wrong = math.log(1 + math.exp(3))
    assert work.loss(crossed, clip_loss).item() == pytest.approx(2.0 * wrong + 0.5 * low, rel=1e-6)


def test_training_is_plain_and_only_the_repairs_second_view_is_augmented() -> None:
    method = CleanCLIP(eda=0.5)
    work = method.repair().method
    batch = Batch(torch.rand(4, 3, 16, 16), ["a dog on the long road"] * 4, np.arange(4, dtype=np.uint64))
    second = Batch(batch.images, batch.captions, batch.keys, view=1)
    assert method.augment(second) is second and (method.view_count, work.view_count) == (1, 2)
    assert work.augment(batch) is batch
    seen = work.augment(second)
    assert not torch.equal(seen.images, batch.images) and seen.captions != batch.captions
    out = ClipOutput(torch.eye(2), torch.eye(2).flip(0), torch.tensor(5.0))
    assert method.loss(out, clip_loss) == clip_loss(out)


def test_the_stage_is_the_methods_own_and_nobody_else_repairs() -> None:
    plan = CleanCLIP(clean=300, epochs=2, batch=32, lr=1e-4, warmup=3, weight_decay=0.2).repair()
    assert (plan.clean, plan.epochs, plan.batch, plan.lr, plan.warmup, plan.weight_decay) == (300, 2, 32, 1e-4, 3, 0.2)
    assert Defense().repair() is None


@pytest.mark.parametrize("wrong", [{"clean": 1}, {"clean": 0.0}, {"epochs": 0}, {"lr": 0.0}, {"cross": 0.0, "inner": 0.0}, {"batch": 1}])
def test_what_cannot_repair_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CleanCLIP(**wrong)
