"""The nearest caption by transport against brute force over the whole pool: noise, clusters, ties, padding, both precisions."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from defenses import token_pool, transport_matching
from defenses.base import Features
from defenses.token_pool import TokenPool
from defenses.transport import transport_cost
from defenses.transport_matching import transport_nearest, transport_pairs


def distances(images: Features, pool: Features, epsilon: float = 0.0, weight: float = 0.0) -> torch.Tensor:
    """(N, M) float64, every pair solved: POT for ε = 0."""
    assert images.tokens is not None and pool.tokens is not None and pool.mask is not None
    rows = []
    for x in images.tokens.double():
        costs = 1 - torch.einsum("pd,mld->mpl", x, pool.tokens.double())
        if epsilon:
            b = pool.mask.double() / pool.mask.sum(1, keepdim=True)
            rows.append(transport_cost(costs, b=b, epsilon=epsilon, tol=1e-6)[0])
        else:
            # + 1: POT finds no plan where all costs are negative, as between equal vectors that are a little too long
            parts = [(c[:, keep] + 1).contiguous().numpy() for c, keep in zip(costs, pool.mask, strict=True)]
            rows.append(torch.tensor([ot.emd2([], [], c) - 1 for c in parts], dtype=torch.float64))
    cosine = images.pooled.double() @ pool.pooled.double().T
    return weight * (1 - cosine) + (1 - weight) * torch.stack(rows)


def check(images: Features, pool: Features, **options: float) -> torch.Tensor:
    """Exactly the nearest, of equals the first, and a true certificate. Returns `solved`."""
    assert images.tokens is not None and pool.tokens is not None
    expected = distances(images, pool, **options)
    best = expected.amin(1)
    match = transport_nearest(images.tokens, pool.tokens, pool.mask, image_global=images.pooled, pool_global=pool.pooled, **options)
    assert match.solved is not None and match.margin is not None
    nearest = (expected <= best[:, None] + 1e-9).int().argmax(1)
    assert torch.equal(match.index, nearest)
    assert match.index.dtype == match.solved.dtype == torch.int64 and match.distance.dtype == match.margin.dtype == torch.float32
    torch.testing.assert_close(match.distance.double(), best, rtol=0, atol=1e-6)
    others = expected - best[:, None] + torch.where(same(pool, options.get("weight", 0.0))[match.index], torch.inf, 0)
    assert (match.margin >= 0).all() and (match.margin <= others.amin(1) + 1e-6).all()
    return match.solved


def same(pool: Features, weight: float) -> torch.Tensor:
    """(M, M): captions equal in every number that counts."""
    assert pool.tokens is not None and pool.mask is not None
    order = pool.mask.int().argsort(dim=1, descending=True, stable=True)  # holes do not count
    tokens = (pool.tokens * pool.mask[:, :, None]).gather(1, order[:, :, None].expand(pool.tokens.shape))
    whole = torch.cat([tokens.flatten(1), pool.mask.sum(1, keepdim=True), pool.pooled * (weight > 0)], 1)
    return (whole[:, None] == whole).all(2)


def sets(draw: torch.Generator, count: int, size: int, topics: torch.Tensor, spread: float) -> torch.Tensor:
    topic = topics[torch.randint(len(topics), (count,), generator=draw)]
    own = topic + 0.3 * torch.randn(topic.shape, generator=draw)
    return F.normalize(own[:, None] + spread * torch.randn(count, size, topics.shape[1], generator=draw), dim=2)


def example(images: int, pool: int, patches: int, words: int, d: int = 16, spread: float = 0.7, seed: int = 0) -> tuple[Features, Features]:
    """Clusters, or noise for a large spread; an eighth of the pool has a copy, and an eighth a copy with its words in another order."""
    draw = torch.Generator().manual_seed(seed)
    topics = torch.randn(10, d, generator=draw)
    x, y = sets(draw, images, patches, topics, spread), sets(draw, pool, words, topics, spread)
    mask = torch.rand(pool, words, generator=draw) < 0.7  # with holes: a mask is any subset
    mask[:, 0] = True
    eighth = pool // 8
    y[-eighth:], mask[-eighth:] = y[:eighth], mask[:eighth]
    order = torch.randperm(words, generator=draw)
    y[-2 * eighth : -eighth], mask[-2 * eighth : -eighth] = y[:eighth, order], mask[:eighth, order]
    pooled = F.normalize((y.double() * mask[:, :, None]).sum(1), dim=1).float()
    for part in (slice(-eighth, None), slice(-2 * eighth, -eighth)):
        pooled[part] = pooled[:eighth]
    return Features(F.normalize(x.mean(1), dim=1), x), Features(pooled, y, mask)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize(
    ("sizes", "spread", "solves"),
    [((12, 260, 16, 12), 0.7, 8), ((8, 120, 5, 8), 0.7, 8), ((4, 60, 20, 20), 0.7, 8), ((8, 60, 7, 9), 1e3, 20)],
    ids=["clusters", "small", "square", "noise"],
)
def test_it_is_brute_force(monkeypatch, sizes, spread, solves, weight, half):
    monkeypatch.setattr(token_pool, "half_is_quicker", lambda device: half)
    solved = check(*example(*sizes, spread=spread), weight=weight)
    assert solved.amin() >= 1 and solved.double().mean() <= solves


@pytest.mark.parametrize("epsilon", [0.2, 0.05])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_with_entropic_plans_too(epsilon, weight):
    check(*example(10, 230, 9, 7), epsilon=epsilon, weight=weight)
    check(*example(4, 40, 9, 7, spread=1e3), epsilon=epsilon, weight=weight)


def test_a_weight_of_one_is_the_cosine():
    images, pool = example(10, 60, 4, 4)
    match = transport_nearest(images.tokens, pool.tokens, pool.mask, weight=1.0, image_global=images.pooled, pool_global=pool.pooled)
    torch.testing.assert_close(match.distance, (1 - images.pooled @ pool.pooled.T).amin(1))
    assert match.solved is not None and not match.solved.any()
    assert torch.equal(match.index, (images.pooled.double() @ pool.pooled.double().T).argmax(1))


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_ties_duplicates_zeros_and_collinear_vectors(seed, images, pool, patches, words, weight):
    """Entries −1, 0, 1 in two dimensions: most distances are shared by several captions; features need not be unit vectors."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-1, 2, (*shape, 2), generator=draw).float() for shape in ((images, patches), (pool, words)))
    mask = torch.rand(pool, words, generator=draw) < 0.6
    mask[:, -1] = True
    left, right = (torch.randint(-1, 2, (count, 2), generator=draw).float() for count in (images, pool))
    check(Features(left, x), Features(right, y, mask), weight=weight)


def test_one_image_or_many_in_any_chunks():
    images, pool = example(30, 250, 6, 6)
    whole = transport_nearest(images.tokens, pool.tokens, pool.mask)
    ready = TokenPool(pool.tokens, pool.mask)
    assert len(ready.row) <= 250 - 250 // 8  # equal captions are one
    parts = [transport_nearest(images.tokens[low : low + 7], ready) for low in range(0, 30, 7)]
    for name in ("index", "solved"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    torch.testing.assert_close(torch.cat([part.distance for part in parts]), whole.distance, rtol=0, atol=1e-7)
    empty = transport_nearest(images.tokens[:0], ready)
    assert all(x is not None and x.shape == (0,) for x in empty[:4]) and empty.index.dtype == torch.int64


def test_images_share_the_whole_pool_or_gather_what_is_left(monkeypatch):
    """Both ways of the screen, which the test against brute force needs to have taken; where a handful is left none of them."""
    monkeypatch.setattr(transport_matching, "FEW", 8)
    screened = []
    screen = transport_matching._Search._screen
    monkeypatch.setattr(
        transport_matching._Search, "_screen", lambda self, *args: (screened.append([len(x) for x in args[:2]]), screen(self, *args))
    )
    check(*example(12, 260, 16, 12))
    assert any(images > 1 for images, _ in screened) and any(images == 1 and captions < 200 for images, captions in screened)
    assert all(captions > 8 for _, captions in screened)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_an_image_of_one_token_has_one_plan_and_needs_no_search(epsilon):
    images, pool = example(20, 90, 1, 6)
    check(images, pool)
    match = transport_nearest(images.tokens, pool.tokens, pool.mask, epsilon=epsilon)
    masses = pool.mask.float() / pool.mask.sum(1, keepdim=True)
    cost = 1 - images.tokens[:, 0] @ torch.einsum("mld,ml->dm", pool.tokens, masses)
    torch.testing.assert_close(match.distance, cost.amin(1), atol=1e-5, rtol=0)
    assert float(match.solved.float().mean()) < 3


def test_products_of_rounded_inputs_are_allowed_for():
    images, pool = example(8, 230, 9, 7)
    torch.set_float32_matmul_precision("medium")
    try:
        match = transport_nearest(images.tokens, pool.tokens, pool.mask)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(match.index, transport_nearest(images.tokens, pool.tokens, pool.mask).index)


def test_sinkhorns_bound_spares_solves(monkeypatch):
    images, pool = example(6, 200, 20, 9, d=64, spread=1e3)
    solved = check(images, pool).double().mean()
    monkeypatch.setattr(transport_matching, "HARD", 1000)
    assert solved < check(images, pool).double().mean()


def test_a_shortlist_is_approximate_and_says_so():
    images, pool = example(40, 300, 8, 6)
    exact = transport_nearest(images.tokens, pool.tokens, pool.mask)
    found = {k: transport_nearest(images.tokens, pool.tokens, pool.mask, approximate=k) for k in (1, 20, 1000)}
    assert torch.equal(found[1000].index, exact.index) and (found[1000].margin >= 0).all()
    hits = [float((found[k].index == exact.index).double().mean()) for k in (1, 20)]
    assert 0 < hits[0] < hits[1]
    for match in found.values():
        assert (match.distance >= exact.distance - 1e-6).all()
        missed = match.distance > exact.distance + 1e-6
        assert (match.margin[missed] < 0).all()


def test_pairs_are_the_same_distance():
    images, pool = example(12, 12, 6, 7)
    for epsilon, weight in ((0.0, 0.0), (0.0, 0.5), (0.1, 0.3), (0.0, 1.0)):
        expected = distances(images, pool, epsilon, weight).diagonal()
        torch.testing.assert_close(transport_pairs(images, pool, epsilon=epsilon, weight=weight).double(), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one caption an image"):
        transport_pairs(images, Features(*(x[:3] for x in pool if x is not None)))


def test_features_in_training_carry_no_gradient_into_a_match():
    images, pool = example(3, 20, 4, 4)
    match = transport_nearest(images.tokens.clone().requires_grad_(), pool.tokens.clone().requires_grad_(), pool.mask)
    assert not match.distance.requires_grad
    half = transport_nearest(images.tokens.half(), pool.tokens.bfloat16(), pool.mask)
    assert half.distance.dtype == torch.float32


def test_what_cannot_be_matched_is_refused():
    x, y = torch.eye(4)[None], torch.eye(4)[None].repeat(3, 1, 1)
    mask = torch.ones(3, 4, dtype=torch.bool)
    for message, arguments in {
        "pool's features": (x[:, :, :3], y),
        "empty": (x, y[:0]),
        r"give \(M, L, d\)": (x, y, mask[:, :3]),
        "no token": (x, y, mask & torch.tensor([[True], [False], [True]])),
        "NaN": (x, y * torch.nan),
        "learning rate": (x * torch.inf, y),
    }.items():
        with pytest.raises(ValueError, match=message):
            transport_nearest(*arguments)
    with pytest.raises(ValueError, match="global features"):
        transport_nearest(x, y, weight=0.5)
    for options in ({"weight": 2.0}, {"epsilon": -0.1}, {"approximate": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            transport_nearest(x, y, **options)


def test_nothing_the_size_of_all_costs_exists():
    """Largest tensor made while matching, by torch's own account."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
            return out

    images, pool = example(200, 2000, 16, 8, spread=1e3)
    with Largest() as seen:
        transport_nearest(images.tokens[:, :, :], pool.tokens, pool.mask, approximate=4)
        ready = TokenPool(pool.tokens, pool.mask)
        search = transport_matching._Search(ready, images.tokens, None, 0.0, 0.0)
        search.bound = search._sorted_bound()
        search._screen(torch.arange(200), torch.arange(len(ready.row)), torch.full((200, 1), np.inf))
    assert seen.entries < 200 * 2000 * 16 * 8 / 20
