"""clip_loss by hand, by finite differences, and by what must not change it."""

import math

import pytest
import torch
from torch.nn import functional as F

from defenses.base import Batch, ClipOutput, Defense, clip_loss


def features(n: int, d: int, seed: int) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1)


def output(image: torch.Tensor, text: torch.Tensor, scale: float | torch.Tensor) -> ClipOutput:
    return ClipOutput(image, text, torch.as_tensor(scale, dtype=image.dtype))


def test_two_pairs_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits 2·[[1, .6], [0, .8]]: rows are images, columns captions
    rows = math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))
    columns = math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))
    assert clip_loss(output(image, text, 2.0)).item() == pytest.approx((rows + columns) / 4)


def test_its_ends():
    eye = torch.eye(5)
    assert clip_loss(output(eye, eye, 100.0)).item() == pytest.approx(0, abs=1e-6)
    assert clip_loss(output(eye, eye, 0.0)).item() == pytest.approx(math.log(5))
    same = eye[:1].expand(5, -1)
    assert clip_loss(output(same, same, 7.0)).item() == pytest.approx(math.log(5))


def test_it_is_symmetric_and_blind_to_the_order_of_pairs():
    image, text = features(6, 4, 0), features(6, 4, 1)
    loss = clip_loss(output(image, text, 5.0))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(clip_loss(output(text, image, 5.0)), loss)
    torch.testing.assert_close(clip_loss(output(image[order], text[order], 5.0)), loss)


def test_gradients_are_finite_differences():
    image, text = features(4, 3, 0).requires_grad_(), features(4, 3, 1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, t, s: clip_loss(ClipOutput(i, t, s)), (image, text, scale))


def test_the_base_defence_leaves_everything_alone():
    none = Defense()
    batch = Batch(torch.rand(2, 3, 4, 4), ["a", "b"], torch.arange(2).numpy().astype("uint64"))
    out = output(features(3, 2, 0), features(3, 2, 1), 4.0)
    assert none.augment(batch) is batch
    assert all(none.matcher(epoch) is None for epoch in range(1, 5))
    assert none.loss(out, clip_loss) == clip_loss(out)
