"""RoCLIP's schedule, its augmentation and the mend in each refusal; Augmented is the same without matching."""

import numpy as np
import pytest
import torch

from defenses.augment import ImageAugment
from defenses.augmented import Augmented
from defenses.base import Batch, ClipOutput, clip_loss
from defenses.matching import CosineMatcher
from defenses.roclip import RoCLIP

CAPTION = "a big dog near the old house in the snow"


def make_batch(n: int = 12) -> Batch:
    images = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(images, [CAPTION] * n, np.arange(n, dtype=np.uint64) * np.uint64(977))


def robust_epochs(defense: RoCLIP, epochs: int = 8) -> list[int]:
    return [epoch for epoch in range(1, epochs + 1) if defense.matcher(epoch) is not None]


@pytest.mark.parametrize(
    ("every", "warmup", "expected"),
    [
        (2, 0, [2, 4, 6, 8]),
        (1, 0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 0, [3, 6]),
        (1, 3, [4, 5, 6, 7, 8]),
        (2, 2, [4, 6, 8]),
        (2, 3, [4, 6, 8]),
        (9, 0, []),
    ],
)
def test_robust_epochs_count_from_one_and_come_after_the_warmup(every, warmup, expected):
    assert robust_epochs(RoCLIP(every=every, warmup=warmup)) == expected


def test_the_matcher_carries_pool_and_mode():
    assert RoCLIP(pool_size=64, matched="caption").matcher(2) == CosineMatcher(64, "caption", tokens=False)
    assert not RoCLIP.needs_tokens


def test_defaults_are_the_papers():
    assert RoCLIP().views == ImageAugment()
    assert (RoCLIP().every, RoCLIP().pool_size, RoCLIP().eda) == (2, 0.02, 0.1)


def test_the_baseline_is_roclip_without_matching():
    batch = make_batch()
    with_matching, without = RoCLIP().augment(batch), Augmented().augment(batch)
    assert torch.equal(with_matching.images, without.images)
    assert with_matching.captions == without.captions
    assert all(Augmented().matcher(epoch) is None for epoch in range(1, 9))


def test_each_side_can_be_turned_off():
    batch = make_batch()
    captions_only, images_only = (
        Augmented(image_augment=False).augment(batch),
        Augmented(text_augment=False).augment(batch),
    )
    assert captions_only.images is batch.images and captions_only.captions != batch.captions
    assert images_only.captions is batch.captions and not torch.equal(images_only.images, batch.images)
    off = Augmented(crop=1, flip=0, jitter=0, gray=0, blur=0, eda=0).augment(batch)
    assert torch.equal(off.images, batch.images) and off.captions == batch.captions


def test_another_epochs_keys_give_other_views():
    batch = make_batch()
    again = Batch(batch.images, batch.captions, batch.keys + np.uint64(1))
    assert not torch.equal(RoCLIP().augment(batch).images, RoCLIP().augment(again).images)
    assert RoCLIP().augment(batch).captions != RoCLIP().augment(again).captions


def test_the_loss_is_clips():
    out = ClipOutput(torch.eye(3), torch.eye(3), torch.tensor(5.0), robust=True)
    assert RoCLIP().loss(out, clip_loss) == clip_loss(out)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("every", 0),
        ("warmup", -1),
        ("matched", "image"),
        ("pool_size", 1),
        ("pool_size", 0),
        ("pool_size", 1.0),
        ("pool_size", 0.0),
        ("crop", 0),
        ("crop", 1.1),
        ("flip", 2),
        ("gray", -0.1),
        ("eda", 1.2),
        ("jitter", 3),
        ("blur", -1),
    ],
)
def test_a_bad_field_is_named_with_its_mend(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.*: give "):
        RoCLIP(**{field: value})


def test_a_localized_second_view_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="local"):
        RoCLIP(local=0.2)
