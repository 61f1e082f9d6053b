"""OTCCLIP: what its matcher finds, its schedule, and its losses against their definitions."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from defenses import otcclip
from defenses.base import ClipOutput, Features, clip_loss
from defenses.matching import CosineMatcher
from defenses.otcclip import OTCCLIP, TransportMatcher, inter_modal, intra_modal, pair_costs
from defenses.roclip import RoCLIP
from defenses.token_pool import TokenPool
from defenses.transport import transport_cost
from defenses.transport_matching import transport_nearest, transport_pairs


def features(rows: int, size: int, seed: int, padded: bool = False, d: int = 8) -> Features:
    draw = torch.Generator().manual_seed(seed)
    tokens = F.normalize(torch.randn(rows, size, d, generator=draw) + torch.randn(rows, 1, d, generator=draw), dim=2)
    length = torch.randint(1, size + 1, (rows, 1), generator=draw) if padded else torch.full((rows, 1), size)
    mask = torch.arange(size) < length
    pooled = F.normalize((tokens * mask[:, :, None]).sum(1), dim=1)
    return Features(pooled, tokens, mask)


def output(rows: int = 6, robust: bool = True, two: bool = True, scale: float = 10.0) -> ClipOutput:
    image, text = features(rows, 4, 1), features(rows, 5, 2, padded=True)
    image_b, text_b = features(rows, 4, 3), features(rows, 6, 4, padded=True)
    more = {"image_tokens_b": image_b.tokens, "text_tokens_b": text_b.tokens, "text_mask_b": text_b.mask} if two else {}
    return ClipOutput(image.pooled, text.pooled, torch.tensor(scale), image.tokens, text.tokens, text.mask, robust=robust, **more)


def distance(x: Tensor, y: Tensor, mask: Tensor, epsilon: float = 0.1) -> Tensor:
    """() of one image and one caption, by definition."""
    return transport_cost(1 - (x @ y[mask].T)[None], epsilon=epsilon)[0][0]


# --- matching ----------------------------------------------------------------------------------------------------------------


def test_it_is_roclip_with_another_matcher_and_tokens():
    defense = OTCCLIP(every=3, pool_size=64, warmup=3, weight=0.25, epsilon=0.0, approximate=9, look=2.0)
    assert [epoch for epoch in range(1, 10) if defense.matcher(epoch)] == [6, 9]
    assert defense.matcher(6) == TransportMatcher(64, "caption", True, 2.0, 1.0, 0.0, 0.25, 9)
    assert OTCCLIP.needs_tokens and defense.views == RoCLIP().views
    assert OTCCLIP(every=1, move=0.1).matcher(1) == TransportMatcher(move=0.1)


def test_the_second_view_is_asked_for_only_where_it_is_used():
    assert (OTCCLIP().view_count, OTCCLIP(beta=0).view_count, RoCLIP().view_count) == (2, 1, 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_matcher_is_transport_nearest(epsilon):
    images, pool = features(9, 4, 5), features(30, 6, 6, padded=True)
    matcher = TransportMatcher(epsilon=epsilon, weight=0.3)
    match = matcher.match(images, pool)
    expected = transport_nearest(
        images.tokens, pool.tokens, pool.mask, epsilon=epsilon, weight=0.3, image_global=images.pooled, pool_global=pool.pooled
    )
    assert torch.equal(match.index, expected.index)
    torch.testing.assert_close(match.distance, expected.distance)


def test_a_pool_is_made_ready_once_and_let_go(monkeypatch):
    made = []

    def counted(*features: Tensor | None) -> TokenPool:
        made.append(features)
        return TokenPool(*features)

    monkeypatch.setattr(otcclip, "TokenPool", counted)
    images, pool = features(4, 4, 5), features(9, 6, 6)
    for _ in range(3):
        TransportMatcher().match(images, pool)
    assert len(made) == 1 and pool.tokens in otcclip._READY
    made.clear()
    before = len(otcclip._READY)
    del pool
    assert len(otcclip._READY) == before - 1


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_an_own_captions_rank_is_the_share_of_the_pool_that_is_nearer_by_transport(epsilon):
    images, pool, own = features(20, 4, 7), features(40, 6, 8, padded=True), features(20, 5, 9, padded=True)
    theirs = transport_pairs(images, own, epsilon=epsilon, weight=0.5)
    each = [Features(*(x[j : j + 1].expand(20, *x.shape[1:]) for x in pool)) for j in range(40)]
    all_pairs = torch.stack([transport_pairs(images, caption, epsilon=epsilon, weight=0.5) for caption in each], 1)
    plain, match = (
        TransportMatcher(epsilon=epsilon).match(images, pool),
        TransportMatcher(epsilon=epsilon, move=0.5).match(images, pool, own),
    )
    torch.testing.assert_close(match.own_distance, theirs)
    low, high = ((all_pairs < theirs[:, None] + slack).float().mean(1) for slack in (-0.02, 0.02))  # ε = 0 ranks by a bound 2 % off at most
    assert bool((low <= match.nearer).all()) and bool((match.nearer <= high).all()) and 0 < float(match.nearer.mean()) < 1
    assert torch.equal(match.index, plain.index) and torch.equal(match.distance, plain.distance)  # what the pool holds does not change
    assert plain.nearer is None and plain.own_distance is None


def test_cosine_is_tried_beside_it_for_comparison():
    assert TransportMatcher.name == "transport" and dict(TransportMatcher().beside) == {"cosine": CosineMatcher()}


# --- losses ------------------------------------------------------------------------------------------------------------------


def test_pair_costs_and_their_gradient_hold_the_plan_fixed():
    left, right = features(5, 4, 10), features(6, 5, 11, padded=True)
    i, j = torch.tensor([0, 0, 3, 4, 4]), torch.tensor([5, 1, 1, 0, 0])  # rows repeat, so gradients must add up
    x, y = (tokens.clone().requires_grad_() for tokens in (left.tokens, right.tokens))
    found = pair_costs(x, y, i, j, 0.1, mask_y=right.mask)
    b = right.mask / right.mask.sum(1, keepdim=True)
    u, v = (tokens.clone().requires_grad_() for tokens in (left.tokens, right.tokens))
    cost = 1 - u[i] @ v[j].mT
    expected, plan = transport_cost(cost, b=b[j], epsilon=0.1)
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    (found * weights).sum().backward()
    ((plan * cost).sum((1, 2)) * weights).sum().backward()
    torch.testing.assert_close(x.grad, u.grad)
    torch.testing.assert_close(y.grad, v.grad)
    assert not y.grad[~right.mask].any()


def test_many_pairs_are_computed_in_parts(monkeypatch):
    x, y = features(7, 4, 10).tokens.requires_grad_(), features(7, 5, 11).tokens.requires_grad_()
    i, j = torch.arange(7), torch.arange(7).flip(0)
    whole = pair_costs(x, y, i, j, 0.1)
    grads = torch.autograd.grad(whole.sum(), (x, y))
    monkeypatch.setattr(otcclip, "_parts", lambda x, y, i: [slice(k, k + 2) for k in range(0, len(i), 2)])
    parts = pair_costs(x, y, i, j, 0.1)
    torch.testing.assert_close(parts, whole)
    for one, other in zip(torch.autograd.grad(parts.sum(), (x, y)), grads, strict=True):
        torch.testing.assert_close(one, other)


def test_without_negatives_it_is_the_mean_cost_of_the_pairs():
    out = output()
    expected = torch.stack([distance(out.image_tokens[k], out.text_tokens[k], out.text_mask[k]) for k in range(6)]).mean()
    torch.testing.assert_close(inter_modal(out, 0.1, 0), expected)


def test_with_negatives_it_is_contrastive_over_the_most_confused():
    out, k = output(rows=7), 2
    cosine = out.image @ out.text.T - 10 * torch.eye(7)
    every = torch.stack(
        [torch.stack([distance(x, y, m) for y, m in zip(out.text_tokens, out.text_mask, strict=True)]) for x in out.image_tokens]
    )
    losses = []
    for table, near in ((every, cosine), (every.T, cosine.T)):
        others = table.gather(1, near.topk(k, dim=1).indices)
        logits = -out.scale * torch.cat([table.diagonal()[:, None], others], 1)
        losses.append(F.cross_entropy(logits, torch.zeros(7, dtype=torch.int64)))
    torch.testing.assert_close(inter_modal(out, 0.1, k), sum(losses) / 2)


def test_equal_captions_are_no_negatives():
    out = output(rows=4)
    same = {name: getattr(out, name)[:1].repeat(4, *[1] * (getattr(out, name).ndim - 1)) for name in ("text", "text_tokens", "text_mask")}
    assert inter_modal(dataclasses.replace(out, **same), 0.1, 2) == 0  # nothing to tell apart
    assert inter_modal(output(rows=2), 0.1, 9) > 0  # as many as there are


def test_views_of_one_thing_cost_little_and_the_second_view_is_padded_by_itself():
    out = output()
    images = torch.stack(
        [transport_cost(1 - (x @ y.T)[None], epsilon=0.1)[0][0] for x, y in zip(out.image_tokens, out.image_tokens_b, strict=True)]
    )
    texts = torch.stack(
        [distance(x[m], y, n) for x, m, y, n in zip(out.text_tokens, out.text_mask, out.text_tokens_b, out.text_mask_b, strict=True)]
    )
    torch.testing.assert_close(intra_modal(out, 0.1), (images.mean() + texts.mean()) / 2)
    twice = dataclasses.replace(out, image_tokens_b=out.image_tokens, text_tokens_b=out.text_tokens, text_mask_b=out.text_mask)
    assert intra_modal(twice, 0.002) < 0.01 < intra_modal(out, 0.002)


def test_the_loss_is_the_weighted_sum():
    out = output()
    plain, inter, intra = clip_loss(out), inter_modal(out, 0.05, 3), intra_modal(out, 0.05)
    defense = OTCCLIP(alpha=0.3, beta=0.2, loss_epsilon=0.05, negatives=3)
    torch.testing.assert_close(defense.loss(out, clip_loss), plain + 0.3 * inter + 0.2 * intra)
    assert OTCCLIP(alpha=0, beta=0).loss(out, clip_loss) == plain


def test_pairs_that_were_not_re_assigned_are_not_aligned():
    out = output(robust=False, two=False)
    assert OTCCLIP(beta=0).loss(out, clip_loss) == clip_loss(out)
    assert OTCCLIP(beta=0, align="always").loss(out, clip_loss) > clip_loss(out)


def test_of_a_robust_epoch_all_pairs_are_aligned_or_the_re_paired_ones_alone():
    moved = torch.tensor([True, False, False, True, False, False])
    out = dataclasses.replace(output(two=False), moved=moved)
    lost = {
        align: OTCCLIP(beta=0, alpha=1, negatives=0, align=align).loss(out, clip_loss) - clip_loss(out) for align in ("robust", "moved")
    }
    costs = torch.stack([distance(out.image_tokens[k], out.text_tokens[k], out.text_mask[k]) for k in range(6)])
    torch.testing.assert_close(lost["robust"], costs.mean())
    torch.testing.assert_close(lost["moved"], costs[moved].sum() / 6)
    none = OTCCLIP(beta=0, align="moved").loss(dataclasses.replace(out, moved=~moved & moved), clip_loss)
    assert none == clip_loss(out)


def test_a_pair_that_moved_keeps_its_negatives_among_those_that_did_not():
    out = output(rows=7)
    rows = torch.arange(7)
    one_by_one = torch.stack([inter_modal(out, 0.1, 2, rows[k : k + 1]) for k in range(7)])
    torch.testing.assert_close(one_by_one.sum(), inter_modal(out, 0.1, 2))
    torch.testing.assert_close(inter_modal(out, 0.1, 2, rows[[1, 4]]), one_by_one[[1, 4]].sum())


def test_the_loss_pulls_pairs_together_under_autocast_too():
    out = output(rows=5)
    tokens = out.image_tokens.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = OTCCLIP().loss(dataclasses.replace(out, image_tokens=tokens), clip_loss)
    loss.backward()
    with torch.no_grad():
        moved = dataclasses.replace(out, image_tokens=tokens - 0.1 * tokens.grad)
    assert inter_modal(moved, 0.1, 4) < inter_modal(out, 0.1, 4) and loss.dtype == torch.float32


@pytest.mark.parametrize(
    "field",
    [
        {"weight": -0.1},
        {"weight": 1.1},
        {"epsilon": -1.0},
        {"loss_epsilon": 0.0},
        {"alpha": -1.0},
        {"beta": -1.0},
        {"negatives": -1},
        {"align": "never"},
        {"approximate": -1},
        {"matched": "embedding"},
        {"every": 0},
    ],
)
def test_a_bad_field_is_named_with_its_mend(field):
    with pytest.raises(ValueError, match=rf"{next(iter(field))}=.*give"):
        OTCCLIP(**field)


def test_stored_embeddings_will_do_without_the_losses():
    assert OTCCLIP(matched="embedding", alpha=0, beta=0).matcher(2).matched == "embedding"
