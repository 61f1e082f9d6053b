"""Transport against POT, its bounds against the optimum on thousands of random problems, and the identities they rest on."""

import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from defenses.transport import (
    entropic_bound,
    lower_bound,
    one_sided_bound,
    sinkhorn_bound,
    sorted_parts,
    transport_cost,
)

BATCH = 24  # problems of one hypothesis example


def uniform(*shape: int) -> torch.Tensor:
    return torch.full(shape, 1 / shape[-1], dtype=torch.float64)


def vectors(draw: torch.Generator, batch: int, size: int, d: int) -> torch.Tensor:
    """Unit vectors, among them zeros, duplicates, collinear and opposite ones."""
    x = F.normalize(torch.randn(batch, size, d, generator=draw, dtype=torch.float64), dim=2)
    kind = torch.randint(8, (batch, size, 1), generator=draw)
    x = torch.where(kind == 0, 0.0, x)
    x = torch.where(kind == 1, x[:, :1], x)
    x = torch.where(kind == 2, -x[:, :1], x)
    return torch.where(kind == 3, 0.5 * x[:, :1], x)


def masses(draw: torch.Generator, batch: int, size: int, padded: bool) -> torch.Tensor:
    """Equal masses with padding, or any masses, some zero."""
    keep = torch.rand(batch, size, generator=draw, dtype=torch.float64) < 0.7
    keep[:, 0] = True
    mass = keep.double() if padded else keep * torch.rand(batch, size, generator=draw, dtype=torch.float64).add(1e-3)
    return mass / mass.sum(1, keepdim=True)


def optimum(cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    values = []
    for c, x, y in zip(cost.double().numpy(), a.numpy(), b.numpy(), strict=True):
        rows, columns = np.flatnonzero(x), np.flatnonzero(y)
        part = np.ascontiguousarray(c[np.ix_(rows, columns)])
        low = part.min()  # where all costs are negative POT finds no plan
        values.append(ot.emd2(x[rows], y[columns], part - low) + low * x.sum())
    return torch.tensor(values, dtype=torch.float64)


def check_marginals(plan: torch.Tensor, a: torch.Tensor, b: torch.Tensor, atol: float) -> None:
    assert plan.min() >= 0
    torch.testing.assert_close(plan.sum(2).double(), a.expand_as(plan[:, :, 0]), rtol=0, atol=atol)
    torch.testing.assert_close(plan.sum(1).double(), b.expand_as(plan[:, 0]), rtol=0, atol=atol)


problems = st.tuples(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.sampled_from(["tokens", "any"]))


def make(seed: int, n: int, m: int, d: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        cost = 1 - vectors(draw, BATCH, n, d) @ vectors(draw, BATCH, m, d).mT
    else:  # negative, tied and large entries
        cost = torch.randn(BATCH, n, m, generator=draw, dtype=torch.float64).mul(4).round() * 2.0 ** (d - 3)
    return cost, masses(draw, BATCH, n, kind == "tokens"), masses(draw, BATCH, m, kind == "tokens")


@given(problems)
@settings(max_examples=100, deadline=None)
def test_bounds_stay_below_the_optimum_and_the_exact_value_is_it(problem):
    cost, a, b = make(*problem)
    scale = float(cost.abs().max()) + 1
    best = optimum(cost, a, b)
    value, plan = transport_cost(cost, a, b, epsilon=0)
    torch.testing.assert_close(value, best, rtol=0, atol=1e-9 * scale)
    check_marginals(plan, a, b, 1e-12)
    reduced, closer = lower_bound(cost, a, b), sinkhorn_bound(cost, a, b, epsilon=0.01 * scale)
    assert (reduced <= best + 1e-12 * scale).all() and (reduced <= closer + 1e-12 * scale).all() and (closer <= best + 1e-12 * scale).all()
    in_float = lower_bound(cost.float(), a.float(), b.float()).double()
    assert ((in_float - reduced).abs() <= (cost.shape[1] + cost.shape[2] + 4) * 2.0**-24 * scale * 2).all()


@given(problems, st.sampled_from([1.0, 0.1, 0.03]))
@settings(max_examples=60, deadline=None)
def test_entropic_values_lie_where_they_must(problem, epsilon):
    cost, a, b = make(*problem)
    spread = float(cost.max() - cost.min()) + 1e-9
    epsilon, tol = epsilon * spread, 1e-7
    best = optimum(cost, a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, plan = transport_cost(cost, a, b, epsilon=epsilon, tol=tol)
    check_marginals(plan, a, b, 1e-12)
    sizes = torch.minimum((a > 0).sum(1), (b > 0).sum(1)).double()
    assert (value >= best - 1e-9).all() and (value <= best + epsilon * sizes.log() + 4 * tol * spread + 1e-9).all()
    inner = cost.permute(1, 2, 0).masked_fill((a.T[:, None] <= 0) | (b.T <= 0), torch.inf).contiguous()
    below = entropic_bound(inner, a.T.contiguous(), b.T.contiguous(), epsilon)
    assert (below <= value + 20 * tol * spread + 1e-9).all()


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_entropic_plan_is_pots(epsilon, dtype):
    draw = torch.Generator().manual_seed(1)
    cost = torch.rand(6, 9, 5, generator=draw, dtype=torch.float64)
    a, b = masses(draw, 6, 9, False), masses(draw, 6, 5, True)
    value, plan = transport_cost(cost.to(dtype), a.to(dtype), b.to(dtype), epsilon=epsilon, tol=1e-9 if dtype == torch.float64 else 1e-5)
    for k in range(6):
        rows, columns = a[k] > 0, b[k] > 0
        part = cost[k][rows][:, columns].numpy()
        expected = ot.sinkhorn(a[k][rows].numpy(), b[k][columns].numpy(), part, epsilon, "sinkhorn_log", numItermax=20_000, stopThr=1e-12)
        found = plan[k][rows][:, columns].double().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-8 if dtype == torch.float64 else 1e-5)
        assert float(value[k]) == pytest.approx((expected * part).sum(), abs=1e-8 if dtype == torch.float64 else 1e-5)
    assert not plan[a == 0].any() and not plan.mT[b == 0].any()


@pytest.mark.parametrize("epsilon", [3e-2, 3e-3, 3e-4])
def test_small_epsilon_converges_to_the_optimum(epsilon):
    """Where Sinkhorn's iteration alone would take tens of thousands of steps, and e^(C/ε) leaves float32."""
    cost = torch.rand(20, 12, 9, generator=torch.Generator().manual_seed(2))
    best = optimum(cost, uniform(20, 12), uniform(20, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, plan = transport_cost(cost, epsilon=epsilon, tol=1e-4)
        exact, _ = transport_cost(cost * 100 - 50, epsilon=0)
        far, _ = transport_cost(cost * 100 - 50, epsilon=100 * epsilon)
    check_marginals(plan, uniform(20, 12), uniform(20, 9), 1e-6)
    assert (value - best).min() >= -1e-6 and (value - best).max() <= epsilon * np.log(9)
    torch.testing.assert_close(exact.double(), best * 100 - 50, rtol=0, atol=1e-4)
    torch.testing.assert_close(far, value * 100 - 50, rtol=0, atol=2e-2)


def test_problems_do_not_see_each_other_nor_padding():
    draw = torch.Generator().manual_seed(3)
    cost = torch.rand(300, 16, 12, generator=draw)
    keep = torch.arange(12) < torch.randint(1, 13, (300, 1), generator=draw)
    b = keep / keep.sum(1, keepdim=True)
    wild = torch.where(keep[:, None], cost, 1e6 * torch.randn(cost.shape, generator=draw))
    value, plan = transport_cost(wild, b=b, epsilon=0.05)
    for k in (0, 7, 299):
        size = int(keep[k].sum())
        alone, its_plan = transport_cost(cost[k : k + 1, :, :size], epsilon=0.05)
        torch.testing.assert_close(value[k : k + 1], alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(plan[k, :, :size], its_plan[0], rtol=0, atol=1e-6)
        assert not plan[k, :, size:].any()
        for bound in (lower_bound, sinkhorn_bound):
            torch.testing.assert_close(bound(wild, b=b)[k : k + 1], bound(cost[k : k + 1, :, :size]), rtol=0, atol=1e-5)


def test_lower_precision_is_computed_in_float32():
    cost = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(4)).bfloat16()
    for epsilon in (0, 0.1):
        value, plan = transport_cost(cost, epsilon=epsilon)
        assert value.dtype == plan.dtype == torch.float32
        torch.testing.assert_close(value, transport_cost(cost.float(), epsilon=epsilon)[0], rtol=0, atol=0)


def test_no_problems_and_single_points():
    for epsilon in (0, 0.1):
        value, plan = transport_cost(torch.empty(0, 3, 4), epsilon=epsilon)
        assert value.shape == (0,) and plan.shape == (0, 3, 4)
        assert transport_cost(torch.full((1, 1, 1), 3.0), epsilon=epsilon)[0].tolist() == [3]
    assert lower_bound(torch.empty(0, 3, 4)).shape == (0,)
    assert lower_bound(torch.full((2, 1, 1), 3.0)).tolist() == [3, 3]


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_gradient_is_the_plan(epsilon):
    """⟨T.detach(), C⟩: with the plan held fixed the value is linear in the cost; at ε = 0 this is the value's own gradient."""
    draw = torch.Generator().manual_seed(5)
    x, y = (F.normalize(torch.randn(2, size, 4, generator=draw, dtype=torch.float64), dim=2).requires_grad_() for size in (5, 3))
    value, plan = transport_cost(1 - x @ y.mT, epsilon=epsilon, tol=1e-10)
    assert not plan.requires_grad
    value.sum().backward()
    for leaf in (x, y):
        step = torch.randn(leaf.shape, generator=draw, dtype=torch.float64) * 1e-6
        ends = []
        for sign in (1, -1):
            moved = [(z + sign * step if z is leaf else z).detach() for z in (x, y)]
            cost = 1 - moved[0] @ moved[1].mT
            ends.append((plan * cost).sum() if epsilon else transport_cost(cost, epsilon=0)[0].sum())
        assert float((leaf.grad * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-6)


# --- identities of token sets under C = 1 − ⟨x, y⟩ ---------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_bounds_from_the_sets_themselves(seed, n, m, d):
    draw = torch.Generator().manual_seed(seed)
    x, y = vectors(draw, BATCH, n, d), vectors(draw, BATCH, m, d)
    cost = 1 - x @ y.mT
    best = optimum(cost, uniform(BATCH, n), uniform(BATCH, m))
    independent = 1 - (x.mean(1) * y.mean(1)).sum(1)
    torch.testing.assert_close(cost.mean((1, 2)), independent)
    assert (best <= independent + 1e-12).all()
    # FILIP's late interaction is one side alone.
    filip = (1 - cost).amax(2).mean(1)
    weights = uniform(BATCH, m).T
    sided = one_sided_bound((1 - cost).permute(1, 2, 0)[None], weights)[0]
    assert (1 - filip <= sided + 1e-12).all() and (sided <= lower_bound(cost) + 1e-12).all()
    # Sorted coordinates: with one part the distance of the means, closer with parts that nest.
    last = None
    for parts in (1, 2, 8):
        (qx, rx), (qy, ry) = sorted_parts(x, parts), sorted_parts(y, parts)
        below = 1 - rx - ry - (qx * qy).sum(1)
        assert (below <= best + 1e-12).all() and (last is None or (last <= below + 1e-12).all())
        last = below
        if parts == 1:
            norms = (x.square().sum(2).mean(1) + y.square().sum(2).mean(1)) / 2
            torch.testing.assert_close(below, 1 - norms + 0.5 * (x.mean(1) - y.mean(1)).square().sum(1))


def test_unit_sets_cost_at_least_half_the_squared_distance_of_their_means():
    draw = torch.Generator().manual_seed(6)
    x, y = (F.normalize(torch.randn(50, size, 6, generator=draw), dim=2) for size in (7, 4))
    value, _ = transport_cost(1 - x @ y.mT, epsilon=0)
    assert (value >= 0.5 * (x.mean(1) - y.mean(1)).square().sum(1) - 1e-6).all()


def test_large_epsilon_is_global_matching():
    draw = torch.Generator().manual_seed(7)
    x, y = (F.normalize(torch.randn(20, size, 6, generator=draw), dim=2) for size in (7, 4))
    value, plan = transport_cost(1 - x @ y.mT, epsilon=1e4)
    torch.testing.assert_close(value, 1 - (x.mean(1) * y.mean(1)).sum(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 28), rtol=0, atol=1e-5)


def test_the_entropic_bound_is_close_where_it_is_used():
    draw = torch.Generator().manual_seed(8)
    x, y = (F.normalize(torch.randn(50, size, 32, generator=draw) + 1, dim=2) for size in (16, 10))
    cost = 1 - x @ y.mT
    value, _ = transport_cost(cost, epsilon=0.1, tol=1e-7)
    inner = cost.permute(1, 2, 0).contiguous()
    below = entropic_bound(inner, torch.full((16, 50), 1 / 16), torch.full((10, 50), 1 / 10), 0.1)
    assert (below <= value + 1e-4).all() and (value - below).mean() < 0.2 * (value - lower_bound(cost)).mean()


# --- what a user can mend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": 0.1, "tol": 0}, "tol"),
        ({"epsilon": 0, "a": torch.ones(3)}, r"give \(2,\) or"),
        ({"epsilon": 0, "b": torch.tensor([0.5, -0.5, 1.0])}, "negative"),
        ({"epsilon": 0, "b": torch.tensor([0.5, torch.nan, 1.0])}, "negative or NaN"),
        ({"epsilon": 0, "b": torch.zeros(3)}, "no mass"),
    ],
)
def test_what_cannot_be_solved_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        transport_cost(torch.zeros(1, 2, 3), **arguments)


def test_costs_that_are_not_finite():
    """A diverged model: an error where the solver might not return, a warning and NaN where a loss scaler would skip the step."""
    cost = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(9))
    cost[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        transport_cost(cost, epsilon=0)
    with pytest.warns(RuntimeWarning, match="1 of 3"):
        value, _ = transport_cost(cost, epsilon=0.1)
    assert value.isnan().tolist() == [False, True, False]


def test_a_matrix_is_no_batch():
    with pytest.raises(ValueError, match=r"\(B, n, m\)"):
        transport_cost(torch.zeros(2, 3), epsilon=0)
