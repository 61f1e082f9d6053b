"""Suspicion scores against their definitions, pair by pair, and against planted outliers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from defenses import detect
from defenses.base import Features
from defenses.otcclip import OTCCLIP
from defenses.token_pool import TokenPool
from defenses.transport_matching import transport_pairs


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def by_hand(x: np.ndarray, k: int) -> dict[str, list[float]]:
    """k-dist, SLOF and DAO by their formulas, one point at a time."""
    n, d = x.shape
    away = [sorted((float(np.linalg.norm(x[i] - x[j])), j) for j in range(n) if j != i)[:k] for i in range(n)]
    far = [near[-1][0] for near in away]
    lid = [min(d, -k / sum(math.log(r / near[-1][0]) for r, _ in near)) for near in away]
    return {
        "kdist": far,
        "slof": [sum(far[i] / far[j] for _, j in near) / k for i, near in enumerate(away)],
        "dao": [sum(lid[j] * math.log(far[i] / far[j]) for _, j in near) / k for i, near in enumerate(away)],
    }


@pytest.mark.parametrize(("count", "width", "k"), [(40, 5, 3), (60, 16, 16), (25, 2, 7)])
def test_local_outliers_are_what_their_formulas_say(count: int, width: int, k: int):
    x = unit(count, width, count)
    found, wanted = detect.outliers(x, k), by_hand(x.double().numpy(), k)
    for name, values in wanted.items():
        assert found[name].tolist() == pytest.approx(values, rel=1e-3, abs=1e-4), name


def test_a_point_away_from_a_cluster_stands_out_most():
    cluster = unit(1, 8, 0) + 0.05 * unit(50, 8, 1)
    x = torch.cat([cluster, -unit(1, 8, 0)])
    for name, values in detect.outliers(x, 5).items():
        assert int(values.argmax()) == 50, name


def test_equal_images_have_no_infinite_scores():
    """More copies than neighbours: every distance among them is 0, and so would be what the ratios divide by."""
    x = torch.cat([unit(1, 8, 0).repeat(20, 1), unit(30, 8, 1)])
    found = detect.outliers(x, 16)
    assert all(bool(values.isfinite().all()) for values in found.values())
    assert found["slof"][:20].tolist() == pytest.approx([1.0] * 20)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="16 pairs are too few to have 16 neighbours"):
        detect.neighbours(unit(16, 4, 0), 16)


@pytest.mark.parametrize(("count", "size"), [(1, 512), (511, 512), (1023, 512), (6000, 512), (1025, 512)])
def test_batches_cover_all_pairs_and_none_is_small(count: int, size: int):
    edges = detect.batches(count, size)
    assert [a for a, _ in edges] == [0, *(b for _, b in edges[:-1])] and edges[-1][1] == count
    assert all(size <= b - a < 2 * size for a, b in edges) or (count < size and len(edges) == 1)


def test_mismatch_is_one_less_the_cosine():
    a, b = unit(9, 4, 0), 3 * unit(9, 4, 1)
    assert detect.mismatch(a, b).tolist() == pytest.approx([1 - float(x @ y / y.norm()) for x, y in zip(a, b, strict=True)], abs=1e-6)


def test_transport_excess_is_the_own_distance_less_the_smallest_of_the_pool():
    how = OTCCLIP()
    images = Features(unit(6, 8, 0), unit(24, 8, 1).view(6, 4, 8))
    mask = torch.tensor([[True] * n + [False] * (5 - n) for n in (3, 5, 2, 4, 1, 5)])
    own = Features(unit(6, 8, 2), unit(30, 8, 3).view(6, 5, 8), mask)
    pool = Features(unit(7, 8, 4), unit(35, 8, 5).view(7, 5, 8), torch.ones(7, 5, dtype=torch.bool))
    found = detect.transport_excess(images, own, TokenPool(pool.tokens, pool.mask, pool.pooled))
    each = []
    for j in range(7):
        one = Features(*(x[j : j + 1].expand(6, *x.shape[1:]) for x in pool))
        each.append(transport_pairs(images, one, epsilon=how.epsilon, weight=how.weight))
    wanted = transport_pairs(images, own, epsilon=how.epsilon, weight=how.weight) - torch.stack(each).amin(0)
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)


def test_the_tail_is_the_share_that_scores_as_much():
    values = np.array([3.0, 1.0, 2.0, 1.0, np.nan])
    assert detect.tail(values).tolist() == [0.25, 1.0, 0.5, 1.0, 1.0]
    assert detect.tail(np.full(3, np.nan)).tolist() == [1.0] * 3


def test_scores_of_one_family_share_one_vote():
    high = np.arange(4.0)
    alone, both = (detect.combine(scores) for scores in ({"kdist": high}, {"kdist": high, "slof": high}))
    assert sum(both.values()).tolist() == pytest.approx(sum(alone.values()).tolist())
    wanted = [-math.log(share) for share in (1, 0.75, 0.5, 0.25)]
    assert alone["kdist"].tolist() == pytest.approx(wanted)
    apart = detect.combine({"kdist": high, "clip": high})
    assert sum(apart.values()).tolist() == pytest.approx([2 * x for x in wanted])


def test_a_caption_ranks_as_in_the_look_that_it_fits_worst():
    pool = torch.eye(3)
    captions = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    sharp = torch.tensor([[0.9, 0.3, 0.1], [0.9, 0.3, 0.1]])  # both fit their caption best
    soft = torch.tensor([[0.8, 0.3, 0.1], [0.2, 0.9, 0.5]])  # without its trigger the second fits two others better
    assert detect.nearer((sharp, soft), captions, pool).tolist() == pytest.approx([0, 2 / 3])
    assert detect.nearer((sharp,), captions, pool).tolist() == [0, 0]


def test_pairs_compare_inside_their_group():
    values = np.array([1.0, 2, 3, 4, 10, 20])
    group = np.array([0, 0, 0, 0, 1, 1])
    assert detect.tails(values, group).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 1, 0.5])
    assert detect.tails(values, None).tolist() == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    added = detect.combine({"clip": values}, group=group)["clip"]
    assert added.argmax() == 3 and added[4] == 0


def test_a_score_that_all_pairs_share_adds_nothing():
    added = detect.combine({"conflict": np.zeros(5), "clip": np.arange(5.0)})
    assert not added["conflict"].any() and added["clip"].argmax() == 4
