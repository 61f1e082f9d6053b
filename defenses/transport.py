"""Optimal transport between small sets, in batches: plans, their cost, and lower bounds that cost almost nothing.

For a cost C (n × m) and masses a (n), b (m) of equal total, a plan T ≥ 0 has T·1 = a and Tᵀ·1 = b, and OT(C) = min_T ⟨C, T⟩.
Shapes: B problems, n and m points. Padding is a point of zero mass: no plan reaches it and no bound sees its costs, which need
only be finite. Inside, the batch is the last axis: every step is then elementwise over contiguous memory, with reductions along
outer axes, which is 2 to 10 times faster on a CPU than reducing rows of 16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHECK = 8  # iterations between two looks at the marginals
SINKHORN, NEWTON = 64, 1000  # iterations of Sinkhorn's, then at most so many Newton steps for the problems that are left
RATIO = 0.8  # of the two ε of `entropic_bound`
ENTROPIC_SLACK = (1 + RATIO) / (1 - RATIO)  # how much it magnifies rounding
ABSORB = 30.0  # largest |ln| of a scaling before it moves into the potentials; float32 holds e^88
Solver = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def transport_cost(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, epsilon: float, tol: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """(⟨C, T⟩ (B,), T (B, n, m)) for cost (B, n, m) of finite numbers.

    epsilon = 0: T is an optimal plan, from an assignment solver where all masses are equal and n = m, else from POT's network
        simplex; both on the CPU in float64.
    epsilon > 0: T minimises ⟨C, T⟩ + ε·Σ T·ln T, up to marginals off by at most `tol` (sum of absolute differences, for a total mass of
        1): by Sinkhorn's iteration (Cuturi 2013), and by Newton's method (in float64) where that is slow, as for small ε. Then rows
        and columns are scaled down and what is missing is added as a product (Altschuler et al. 2017), so that the marginals are a
        and b to rounding. For a mass of 1: OT(C) ≤ ⟨C, T⟩ ≤ OT(C) + ε·ln min(n, m) + 4·tol·(max C − min C).
    a (n) or (B, n), b (m) or (B, m): masses, zero for padding; None = uniform. b is scaled to the total of a.
    Each problem stops by itself, so results do not depend on the rest of the batch. Scalings are absorbed into the potentials before
    they overflow.

    The plan carries no gradient: the value's gradient with respect to the cost is T, which is the envelope theorem for ε = 0 and
    the detached-plan loss of OTCCLIP for ε > 0. bf16 and fp16 costs are computed in float32; tol < 1e-5 asks for float64 inside.
    Raises ValueError for wrong shapes, negative masses, a problem without mass, or, with epsilon = 0, costs that are not finite.
    """
    if epsilon < 0 or tol <= 0:
        raise ValueError(f"epsilon={epsilon}, tol={tol}: give epsilon 0 (exact) or more, and a tolerance above 0")
    with torch.no_grad():
        a, b = _masses(cost, a, b)
        fixed = cost.detach()
        plan = _exact_plans(fixed, a, b) if epsilon == 0 else _entropic_plans(fixed, a, b, epsilon, tol)
    wide = cost if cost.dtype == torch.float64 else cost.float()
    return (plan * wide).sum((1, 2)), plan


@torch.no_grad()
def lower_bound(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """A lower bound (B,) of OT(C), from costs reduced as in the Hungarian method, for cost (B, n, m).

    f_i = min_j C_ij and g_j = min_i (C_ij − f_i) satisfy f_i + g_j ≤ C_ij, so Σ a·f + Σ b·g ≤ OT(C) by weak duality; and the same
    with rows and columns exchanged; the larger of the two. Between token sets of CLIP models it reaches .97 to .99 of OT(C).
    Exact up to rounding, at most (n + m + 4)·2⁻²⁴·max|C| in float32. Masses as in `transport_cost`.
    """
    a, b = _masses(cost, a, b)
    bound = a.new_empty(len(cost))
    for which, part in _batch_last(cost, a, b):
        bound[which] = reduced_bound(*part)
    return bound


def reduced_bound(cost: Tensor, a: Tensor, b: Tensor, padded: bool = True) -> Tensor:
    """`lower_bound` in the inner layout: cost (n, m, B), a (n, B), b (m, B); padded: whether costs may be infinite (padding)."""
    mend = _finite if padded else lambda potential: potential
    rows, columns = mend(cost.amin(1)), mend(cost.amin(0))
    by_row = (a * rows).sum(0) + (b * mend((cost - rows[:, None]).amin(0))).sum(0)
    by_column = (b * columns).sum(0) + (a * mend((cost - columns).amin(1))).sum(0)
    return torch.maximum(by_row, by_column)


@torch.no_grad()
def sinkhorn_bound(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, epsilon: float = 0.01, iterations: int = 24
) -> Tensor:
    """A tighter lower bound (B,) of OT(C): Sinkhorn's potentials after a few iterations, made feasible by a c-transform.

    From any g: f_i = min_j (C_ij − g_j), then g_j = min_i (C_ij − f_i), and Σ a·f + Σ b·g ≤ OT(C). About 10 times the work of
    `lower_bound`, and 5 to 10 times closer to OT(C) at ε near 1 % of the costs' spread. Never below `lower_bound`.
    """
    a, b = _masses(cost, a, b)
    bound = a.new_empty(len(cost))
    for which, part in _batch_last(cost, a, b):
        bound[which] = inner_sinkhorn_bound(*part, epsilon, iterations)
    return bound


def inner_sinkhorn_bound(cost: Tensor, a: Tensor, b: Tensor, epsilon: float = 0.01, iterations: int = 24) -> Tensor:
    """`sinkhorn_bound` in the inner layout."""
    _, g, _ = _sinkhorn(cost, a, b, epsilon, 0.0, iterations)
    return torch.maximum(reduced_bound(cost, a, b), _feasible_value(cost, a, b, g))


def _feasible_value(cost: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    f = _finite((cost - g).amin(1))
    return (a * f).sum(0) + (b * _finite((cost - f[:, None]).amin(0))).sum(0)


def one_sided_bound(products: Tensor, masses: Tensor) -> Tensor:
    """A lower bound (n, B) of OT(1 − ⟨x, y⟩) from products (n, P, L, B) and masses (L, B) of the y; those of the x are uniform.

    Each side sends its mass wherever it likes, the other's masses unheeded; the dearer of the two. One pass over the products a side.
    """
    return 1 - torch.minimum(products.amax(2).mean(1), (products.amax(1) * masses).sum(1))


def sorted_parts(sets: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Sets (B, P, d) → vectors q (B, parts·d) and numbers r (B,) with OT(1 − ⟨x, y⟩) ≥ 1 − r_x − r_y − ⟨q_x, q_y⟩ for uniform masses.

    OT of ½‖x − y‖² costs at least the sum of what it costs along each axis; there sorted coordinates are optimal, and by Jensen cost at
    least their means over equal parts of the mass. q: those means, over √parts; r = ½(mean ‖x‖² − ‖q‖²).
    """
    size = sets.shape[1]
    if sets.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(sets.numpy(), axis=1))  # torch's sort takes 5 to 60 times as long on short rows
    else:
        ordered = sets.sort(1).values
    edges = torch.arange(parts + 1, dtype=torch.float64)[:, None] / parts
    ends = torch.arange(size + 1, dtype=torch.float64) / size
    overlap = torch.minimum(edges[1:], ends[1:]) - torch.maximum(edges[:-1], ends[:-1])  # (parts, P)
    shares = (overlap.clamp_min(0) * parts**0.5).to(sets)
    means = torch.matmul(shares, ordered).flatten(1)
    return means, 0.5 * (sets.square().sum((1, 2)) / size - means.square().sum(1))


def entropic_bound(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int = 8) -> Tensor:
    """A lower bound (B,) of ⟨C, T_ε⟩, in the inner layout without padding of a.

    F(ε) = min_T ⟨C, T⟩ + ε·KL(T | a⊗b) makes A(τ) = −τ·F(1/τ) convex with A'(τ) = −⟨C, T_{1/τ}⟩. A secant of A beyond τ = 1/ε is
    steeper than its tangent: ⟨C, T_ε⟩ ≥ (σ·F(1/σ) − τ·F(1/τ)) / (σ − τ) for σ > τ. Any potentials bound F(1/σ) from below, any plan
    F(1/τ) from above, so a few iterations of Sinkhorn's will do. Here τ/σ = .8: nearer to 1 the bound is closer, but the difference
    magnifies rounding, by (σ + τ)/(σ − τ).
    """
    f, g, _ = _sinkhorn(cost, a, b, epsilon, 0.0, iterations)
    plan = _rounded(torch.exp((f[:, None] + g - cost) / epsilon), a, b)
    product = a[:, None] * b
    kl = (plan * torch.where(plan > 0, plan / product, 1).log()).sum((0, 1))
    above = (plan * torch.where(product > 0, cost, 0)).sum((0, 1)) / epsilon + kl
    f, g, _ = _sinkhorn(cost, a, b, RATIO * epsilon, 0.0, iterations)
    mass = torch.exp((f[:, None] + g - cost) / (RATIO * epsilon)).sum((0, 1))
    ln_a, ln_b = (torch.where(x > 0, x, 1).log() for x in (a, b))
    below = (a * (f / (RATIO * epsilon) - ln_a)).sum(0) + (b * (g / (RATIO * epsilon) - ln_b)).sum(0) - (mass - 1)
    return (below - above) * (RATIO * epsilon / (1 - RATIO))


def _finite(potential: Tensor) -> Tensor:
    """A minimum over nothing but padding is infinite; its point has no mass, so any number will do."""
    return torch.where(potential.isinf(), 0, potential)


def _masses(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """a (B, n) and b (B, m) in the computing precision, of equal totals."""
    if cost.ndim != 3:
        raise ValueError(f"cost {tuple(cost.shape)}: give (B, n, m), one matrix a problem")
    dtype = torch.float64 if cost.dtype == torch.float64 else torch.float32
    full = []
    for mass, side, name in ((a, 1, "a"), (b, 2, "b")):
        size = cost.shape[side]
        mass = cost.new_full((size,), 1 / max(size, 1), dtype=dtype) if mass is None else mass.to(cost.device, dtype)
        if mass.shape[-1:] != (size,) or mass.shape[:-1] not in ((), cost.shape[:1]):
            raise ValueError(f"{name} {tuple(mass.shape)}: give ({size},) or ({len(cost)}, {size}) for cost {tuple(cost.shape)}")
        full.append(mass.expand(len(cost), size))
    total, other = full[0].sum(1, keepdim=True), full[1].sum(1, keepdim=True)
    if not bool((torch.stack([mass.amin() for mass in full if mass.numel()] or [total.new_zeros(())]) >= 0).all()):
        raise ValueError("masses must not be negative or NaN")
    if not bool((torch.minimum(total, other) > 0).all()):
        raise ValueError("a problem has no mass on one side: leave out sets that are nothing but padding")
    return full[0], full[1] * (total / other)


def _batch_last(cost: Tensor, a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Parts of the batch that fit a core's cache: (which problems, (cost (n, m, B), infinite at padding, a (n, B), b (m, B))).

    Problems of similar width share a part, and columns that are padding in all of it are left out.
    """
    if not len(cost):
        return
    padded = not bool((a.amin() > 0) & (b.amin() > 0))
    places = torch.arange(1, b.shape[1] + 1, device=b.device)
    widths = (places * (b > 0)).amax(1) if padded else places[-1:].expand(len(b))
    order = widths.argsort(stable=True) if padded else torch.arange(len(b), device=b.device)
    entries = 2**18 if cost.device.type == "cpu" else 2**26
    step = max(16, entries // max(1, cost.shape[1] * int(widths.sum()) // len(b)))
    for which in order.split(step):
        columns = slice(0, int(widths[which[-1]]))
        mass_a, mass_b = a[which].T.contiguous(), b[which, columns].T.contiguous()
        inner = cost[which, :, columns].to(a.dtype).permute(1, 2, 0).contiguous()
        if padded:
            inner.masked_fill_((mass_a[:, None] <= 0) | (mass_b <= 0), torch.inf)
        yield which, (inner, mass_a, mass_b)


def _entropic_plans(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tol: float) -> Tensor:
    plan = torch.zeros(cost.shape, dtype=a.dtype, device=cost.device)
    if tol < 1e-5:
        a, b = a.double(), b.double()
        b = b * (a.sum(1, keepdim=True) / b.sum(1, keepdim=True))
    missed = 0
    for which, part in _batch_last(cost, a, b):
        f, g, met = _sinkhorn(*part, epsilon, tol, SINKHORN)
        if not bool(met.all()):
            hard = ~met
            inner, mass_a, mass_b, f_, g_ = (x[..., hard].double() for x in (*part, f, g))
            f_, g_, met = _newton(inner, mass_a, mass_b, f_, g_, epsilon, tol)
            f[:, hard], g[:, hard] = f_.to(f), g_.to(g)
            missed += int((~met).sum())
        found = _rounded(torch.exp((f[:, None] + g - part[0]) / epsilon), part[1], part[2])
        plan[which, :, : len(g)] = found.permute(2, 0, 1).to(plan.dtype)
    if missed:
        warnings.warn(
            f"{missed} of {len(cost)} transport problems missed a marginal tolerance of {tol:g} at epsilon={epsilon:g}; their plans' "
            "marginals were mended. Raise epsilon, or give 0 for exact transport",
            RuntimeWarning,
            stacklevel=3,
        )
    return plan


def _sinkhorn(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tol: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn's iteration → f (n, B), g (m, B) with T = exp((f + g − C)/ε), and which problems met `tol` (B,).

    Starts at the reduced costs, so each row and column of the kernel has an entry 1 and none divides by 0.
    """
    f = _finite(cost.amin(1))
    g = _finite((cost - f[:, None]).amin(0))
    end_f, end_g = f.clone(), g.clone()
    active = torch.arange(cost.shape[2], device=cost.device)  # the problems still in the batch
    met = torch.zeros_like(active, dtype=torch.bool)
    ended = met.clone()  # of the active
    tiny, total = torch.finfo(cost.dtype).tiny, a.sum(0)
    kernel = torch.exp((f[:, None] + g - cost) / epsilon)
    u, v = torch.ones_like(a), torch.ones_like(b)
    for step in range(iterations + 1):
        rows = (kernel * v).sum(1)
        if step and (step % CHECK == 0 or step == iterations):
            done = (u * rows - a).abs().sum(0) <= tol * total
            ln_u, ln_v = (torch.where(x > 0, x, 1).log() for x in (u, v))
            now = (done | (step == iterations)) & ~ended
            where = active[now]
            end_f[:, where], end_g[:, where] = (f + epsilon * ln_u)[:, now], (g + epsilon * ln_v)[:, now]
            met[where] = done[now]
            ended = ended | now
            left = len(ended) - int(ended.sum())
            if not left:
                break
            if left < 0.75 * len(ended):
                keep = (~ended).nonzero()[:, 0]
                a, b, f, g, u, v, ln_u, ln_v = (x[..., keep] for x in (a, b, f, g, u, v, ln_u, ln_v))
                kernel, rows, total, active, ended = kernel[..., keep], rows[..., keep], total[keep], active[keep], ended[keep]
            if bool(torch.maximum(ln_u.abs().amax(), ln_v.abs().amax()) > ABSORB):
                f, g = f + epsilon * ln_u, g + epsilon * ln_v
                kernel = torch.exp((f[:, None] + g - cost[..., active]) / epsilon)
                u, v = torch.ones_like(u), torch.ones_like(v)
                rows = kernel.sum(1)
        u = a / rows.clamp_min(tiny)
        v = b / (kernel * u[:, None]).sum(0).clamp_min(tiny)
    return end_f, end_g, met


def _newton(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Newton steps on g, f being what makes the rows right, in the log domain (Brauer, Clason, Lorenz & Wirth 2017).

    What Sinkhorn's linear rate leaves after its first iterations takes it thousands more, and this about ten. A step may change no
    potential by more than 2 ε, and a sweep of Sinkhorn's follows each, which makes progress where the system is singular. In and out
    as in `_sinkhorn`, float64.
    """
    f, g = f.clone(), g.clone()
    met = torch.zeros(cost.shape[2], dtype=torch.bool, device=cost.device)
    active = torch.arange(len(met), device=cost.device)
    inner, mass_a, mass_b, at = cost.permute(2, 0, 1).contiguous(), a.T, b.T, g.T  # batch first, as linear algebra wants it
    for _ in range(NEWTON):
        rows = _other(inner, at, mass_a, epsilon)
        plan = torch.exp((rows[:, :, None] + at[:, None] - inner) / epsilon)
        columns = plan.sum(1)
        off = mass_b - columns
        error = off.abs().sum(1)
        good = error <= tol * mass_a.sum(1)
        done = good | error.isnan()  # costs that are not finite have no plan
        if bool(done.any()):
            f[:, active[done]], g[:, active[done]], met[active[done]] = rows[done].T, at[done].T, good[done]
            keep = ~done
            inner, mass_a, mass_b, at, active = inner[keep], mass_a[keep], mass_b[keep], at[keep], active[keep]
            plan, columns, off = plan[keep], columns[keep], off[keep]
        if not len(active):
            return f, g, met
        real = (mass_b > 0).double()
        # Σ g is free; its direction is filled so that the system has one solution. Padding gets an equation of its own.
        system = torch.diag_embed(columns + (1 - real) + 1e-10) + real[:, None] * real[:, :, None] / real.sum(1)[:, None, None] ** 2
        system -= torch.bmm((plan / mass_a.clamp_min(1e-300)[:, :, None]).mT, plan)
        step = torch.linalg.solve_ex(system, off)[0].nan_to_num(0, 0, 0)
        step = (step - (step * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)) * real
        at = at + epsilon * step * (2 / step.abs().amax(1, keepdim=True).clamp_min(2))
        at = _other(inner.mT, _other(inner, at, mass_a, epsilon), mass_b, epsilon)
    f[:, active], g[:, active] = _other(inner, at, mass_a, epsilon).T, at.T
    return f, g, met


def _other(cost: Tensor, g: Tensor, a: Tensor, epsilon: float) -> Tensor:
    """f (B, n) that gives exp((f + g − C)/ε) the row sums a, 0 where a is 0, for cost (B, n, m), g (B, m)."""
    f = epsilon * (a.log() - torch.logsumexp((g[:, None] - cost) / epsilon, 2))
    return torch.where(a > 0, f, 0)


def _rounded(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The plan (n, m, B) with its marginals made a (n, B) and b (m, B); moves at most twice what they were off."""
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (a / plan.sum(1).clamp_min(tiny)).clamp_max(1)[:, None]
    plan = plan * (b / plan.sum(0).clamp_min(tiny)).clamp_max(1)
    rows, columns = (a - plan.sum(1)).clamp_min(0), (b - plan.sum(0)).clamp_min(0)
    return plan + rows[:, None] * (columns / columns.sum(0).clamp_min(tiny))


def _exact_plans(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if not bool(cost.isfinite().all()):
        raise ValueError("costs hold NaN or infinity, which no exact plan can be found for")
    costs, left, right = (x.double().cpu().numpy() for x in (cost, a, b))
    plans = np.zeros(cost.shape)
    for c, x, y, plan, i, j in zip(costs, left, right, plans, _support(left), _support(right), strict=True):
        inside = (i, j) if isinstance(i, slice) and isinstance(j, slice) else np.ix_(np.flatnonzero(x), np.flatnonzero(y))
        plan[inside] = exact_plan(c[inside], x[i], y[j])
    return torch.from_numpy(plans).to(cost.device, a.dtype)


def _support(masses: np.ndarray) -> list[Any]:
    """Where the masses (B, n) are, as indices; a slice, which costs less, where padding comes last."""
    real = masses > 0
    count = real.sum(1)
    leading = (real == (np.arange(masses.shape[1]) < count[:, None])).all(1)
    return [slice(int(c)) if last else np.flatnonzero(r) for c, last, r in zip(count, leading, real, strict=True)]


def exact_plan(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """An optimal plan (n, m) for one cost (n, m) and masses a (n), b (m), all above zero, all float64."""
    if len(a) == len(b) and a.max() == a.min() and np.ptp(b) <= 1e-12 * b[0]:  # Birkhoff: a permutation is optimal
        plan = np.zeros(cost.shape)
        plan[_assignment(cost)] = a[0]
        return plan
    # POT's solver calls problems infeasible whose costs are all negative, and returns nothing; a constant changes no plan.
    return _simplex()(a, b * (a.sum() / b.sum()), np.ascontiguousarray(cost - cost.min()))


def exact_cost(cost: np.ndarray) -> float:
    """OT(C) of one cost (n, m), float64, under uniform masses."""
    n, m = cost.shape
    if n == m:
        return float(cost[_assignment(cost)].mean())
    return float((exact_plan(cost, np.full(n, 1 / n), np.full(m, 1 / m)) * cost).sum())


def _assignment(cost: np.ndarray) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)


@cache
def _simplex() -> Solver:
    """POT's network simplex, (a, b, cost) → plan. POT takes seconds to import, so it is imported when first needed."""
    import ot

    def solve(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> np.ndarray:
        plan, _, _, _, code = emd_c(a, b, cost, 1_000_000, 1)
        return plan if code == 1 else public(a, b, cost)

    def public(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> np.ndarray:
        return ot.emd(a, b, cost, numItermax=10_000_000)

    try:  # the solver itself, without the checks around it, which take three times as long as a small problem
        from ot.lp.emd_wrap import emd_c
    except ImportError:
        return public
    return solve
