"""For each image its caption in a pool: the nearest by optimal transport between their token sets, exactly, almost never solving.

The distance of image i and caption j is λ·(1 − ⟨I_i, T_j⟩) + (1 − λ)·d(i, j), d the transport cost between the image's tokens and the
caption's under C = 1 − ⟨x, y⟩ and uniform masses. Three lower bounds, each dearer and closer, leave few pairs to solve:

    sorted      Expand C = 1 − ½‖x‖² − ½‖y‖² + ½‖x − y‖²: along each axis of feature space the squares cost at least what the sorted
                coordinates cost, and at least what the means of Q equal parts of them cost. So a token set becomes one vector of Q·d
                numbers, and the bound for all pairs is one small matrix product.
    one-sided   Σ_i a_i·min_j C_ij and Σ_j b_j·min_i C_ij: each side sends its mass wherever it likes (FILIP's late interaction).
    reduced     `transport.lower_bound`; for the few it leaves `sinkhorn_bound`, or with ε > 0 `entropic_bound`.

The last two need the tokens' products, made in bf16 where that is quicker and again in float32 for the few that pass. Every bound is
lowered by what rounding may have added, so no caption is lost; survivors are solved in the order of their bounds until the next bound
exceeds the best distance found. N images, M captions, P and L tokens, d features. Nothing of size N × M × P × L exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.base import Features, Match
from defenses.token_pool import PARTS, TokenPool, longest, refuse_nan
from defenses.transport import (
    ENTROPIC_SLACK,
    entropic_bound,
    exact_cost,
    inner_sinkhorn_bound,
    lower_bound,
    one_sided_bound,
    reduced_bound,
    sorted_parts,
    transport_cost,
)

FIRST = 8  # captions bounded in float32 to choose the first to solve
FEW = 32  # captions left for an image that are bounded together with other images'
TOGETHER = 2**16  # entries of the costs that a CPU bounds or solves at a time: they fit its caches, and are worth a call
HARD = 8  # captions left for an image above which Sinkhorn's bound pays
TIE = 1e-9  # distances closer than this are equal: what float64 may leave between two copies of a problem
TOL = 1e-6  # marginals of entropic plans, far below what could tell captions apart
PEERS = 64  # captions of the pool among which an own caption's rank is measured
SAME = 1e-3  # a caption counts as nearer from here on: above what the looser tolerance leaves open
Bound = Callable[[Tensor, Tensor, Tensor], Tensor]
U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of float32 and bf16


@torch.no_grad()
def transport_nearest(
    image_tokens: Tensor,
    pool_tokens: Tensor | TokenPool,
    pool_mask: Tensor | None = None,
    *,
    epsilon: float = 0.0,
    weight: float = 0.0,
    image_global: Tensor | None = None,
    pool_global: Tensor | None = None,
    approximate: int | None = None,
) -> Match:
    """arg min_j weight·(1 − ⟨I_i, T_j⟩) + (1 − weight)·d(i, j) over the whole pool; of equals (to 1e-9) the lowest j.

    image_tokens (N, P, d); pool_tokens (M, L, d) with pool_mask (M, L), False = padding (None: no padding), or, to match many batches
    of images against one pool, a `TokenPool` made of them once. Features of any length, though unit norm is what the distance is
    meant for; computed from float32, images and pool on one device.
    epsilon: 0 = exact transport; above 0 d is ⟨C, T_ε⟩, the cost of the entropic plan (`transport_cost`, tolerance 1e-6).
    weight: λ, share of the global distance, from image_global (N, d') and pool_global (M, d').
    approximate: k = consider only the k captions with the lowest sorted bound; None = the whole pool.
    Returns index (N,), distance (N,), solved (N,) transport problems solved, and margin (N,): a certificate, that no other caption (one
    that differs from the match in any number) is nearer than distance + margin. It is negative only where `approximate` may have
    missed the nearest. Raises ValueError for shapes that do not fit, an empty pool, a caption without tokens, or NaN.
    """
    pool = pool_tokens if isinstance(pool_tokens, TokenPool) else TokenPool(pool_tokens, pool_mask, pool_global if weight else None)
    width = pool.tokens.shape[1]
    if image_tokens.ndim != 3 or image_tokens.shape[2] != width or not image_tokens.shape[1]:
        raise ValueError(f"image tokens {tuple(image_tokens.shape)}: give (N, P, {width}), the pool's features")
    if not 0 <= weight <= 1 or epsilon < 0 or (approximate is not None and approximate < 1):
        raise ValueError(f"weight={weight}, epsilon={epsilon}, approximate={approximate}: give 0 to 1, 0 or more, 1 or more or None")
    if weight and (image_global is None or pool.pooled is None or len(image_global) != len(image_tokens)):
        raise ValueError(f"weight={weight} mixes in global features: give them for images and pool, or weight=0")
    parts = []
    for some in torch.arange(len(image_tokens), device=image_tokens.device).split(max(1, min(512, 2**24 // len(pool.row)))):
        pooled = None if image_global is None or not weight else image_global[some].float()
        with _whole_sums(image_tokens.is_cuda):
            parts.append(_Search(pool, image_tokens[some].float(), pooled, weight, epsilon).run(approximate))
    return Match(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.no_grad()
def transport_pairs(images: Features, captions: Features, *, epsilon: float = 0.0, weight: float = 0.0) -> Tensor:
    """The same distance of each image to its own caption: (N,) float32, for N images and N captions with their tokens."""
    assert images.tokens is not None and captions.tokens is not None
    if len(images.tokens) != len(captions.tokens):
        raise ValueError(f"{len(images.tokens)} images and {len(captions.tokens)} captions: give one caption an image")
    refuse_nan(*(x for part in (images, captions) for x in (part.pooled, part.tokens)))
    masses = captions.mask if captions.mask is not None else captions.tokens.new_ones(captions.tokens.shape[:2])
    values = weight * (1 - (images.pooled.double() * captions.pooled.double()).sum(1))
    for which in torch.arange(len(values), device=values.device).split(1024 if weight < 1 else max(1, len(values))):
        if weight < 1:
            cost = 1 - torch.bmm(images.tokens[which].double(), captions.tokens[which].double().mT)
            values[which] += (1 - weight) * transport_cost(cost, b=masses[which].double(), epsilon=epsilon, tol=TOL)[0]
    return values.float()


@torch.no_grad()
def share_nearer(images: Features, pool: TokenPool, distance: Tensor, *, epsilon: float = 0.0, weight: float = 0.0) -> Tensor:
    """Share of the pool that is nearer to the image than `distance` (N,), on a sample of `PEERS` captions. float32 (N,).

    Which of the two is nearer needs no plan for most: transport costs at least the sorted bound and, entropic, at most what the
    independent coupling costs, 1 − ⟨mean token, mean token⟩. Between the two it is solved, to a looser tolerance than the matching;
    with epsilon = 0 the lower bound stands for it, as a rank needs no more.
    """
    assert images.tokens is not None
    peers = pool.row.argsort()[:PEERS]  # the pool comes in random order
    tokens, masses = pool.tokens[pool.places(peers)].transpose(0, 1), pool.masses(peers).T
    found = distance.new_zeros(len(distance))
    for some in torch.arange(len(distance), device=distance.device).split(1024):
        shown, limit = images.tokens[some].float(), distance[some, None] - SAME
        parts, rest = sorted_parts(shown, PARTS)
        low = (1 - weight) * (1 - rest[:, None] - pool.rest[peers] - parts @ pool.parts[peers].T)
        high = (1 - weight) * (1 - shown.mean(1) @ pool.means[peers].T)
        away = low.new_zeros(())
        if weight:
            assert pool.pooled is not None
            away = weight * (1 - images.pooled[some].float() @ pool.pooled[peers].T)
        nearer = high + away < limit
        i, j = (~nearer & (low + away < limit)).nonzero().unbind(1)
        for which in torch.arange(len(i), device=i.device).split(max(1, 2**24 // tokens[0].numel())):
            cost = 1 - torch.bmm(shown[i[which]], tokens[j[which]].mT)
            mass = masses[j[which]]
            value = transport_cost(cost, b=mass, epsilon=epsilon, tol=1e-3)[0] if epsilon else lower_bound(cost, b=mass)
            value = (1 - weight) * value + (away[i[which], j[which]] if weight else 0)
            nearer[i[which], j[which]] = value < limit[i[which], 0]
        found[some] = nearer.float().mean(1)
    return found


class _Search:
    """One chunk of images against the pool. `bound` (N, M') only ever rises, and stays at or below the distance it bounds."""

    def __init__(self, pool: TokenPool, tokens: Tensor, pooled: Tensor | None, weight: float, epsilon: float) -> None:
        refuse_nan(tokens, pooled)
        self.pool, self.tokens, self.pooled, self.weight, self.epsilon = pool, tokens, pooled, weight, epsilon
        self.device, (_, p, d) = tokens.device, tokens.shape
        norm = longest(tokens)
        # Rounding: of d products each, of the sums over tokens, and of a few operations on numbers below `scale`.
        terms = 8 * (p + int(pool.length[-1]) + 8)
        scale, largest = (norm + pool.norm) ** 2 + 1, norm * pool.norm
        if pooled is not None:
            d, largest = max(d, pooled.shape[1]), largest + longest(pooled) * pool.pooled_norm
        lost = 0.0 if _exact_products(self.device) else 2.02 * U16 * largest  # where the user lets float32 products be rounded
        self.slack, self.sorted_slack = (d + terms) * U32 * (scale + largest) + lost, (PARTS * d + terms) * U32 * (scale + largest) + lost
        self.half_slack, self.near, self.captions = 0.0, tokens, pool.tokens
        if pool.half is not None:
            # In the mean over a coupling: what rounding took from the image's tokens, from the caption's, and from the product.
            self.near, self.captions = tokens.bfloat16(), pool.half
            error = float((tokens - self.near.float()).norm(dim=2).mean(1).amax()) if len(tokens) else 0.0
            self.half_slack = error * 1.01 * pool.norm + norm * pool.half_error + U16 * 1.02 * norm * pool.norm

    def run(self, approximate: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index, distance, solved and margin, each (N,)."""
        images = torch.arange(len(self.tokens), device=self.device)
        if not len(images):
            return images, images.float(), images, images.float()
        self.bound = self._sorted_bound()
        count = self.bound.shape[1]
        shortlist = None
        if approximate is not None and approximate < count:
            shortlist = self.bound.topk(approximate, largest=False).indices
        # A first caption for each image: whatever it costs, every caption with a larger bound is out.
        top = self.bound.topk(min(FIRST, count, approximate or count), largest=False).indices
        bound = self._raise(images.repeat_interleave(top.shape[1]), top.flatten()).view_as(top)
        first = top.gather(1, bound.argmin(1, keepdim=True))[:, 0]
        self.solved = torch.zeros_like(images)
        first_cost = self._solve(images, first)
        self.best = first_cost.clone()
        i, j = self._survivors(shortlist)
        other = j != first[i]
        i, j, cost = self._best_first(i[other], j[other])
        row, distance, margin = self._answer(torch.cat([images, i]), torch.cat([first, j]), torch.cat([first_cost, cost]))
        return row, distance.float(), self.solved, (margin if shortlist is not None else margin.clamp_min(0)).float()

    def _sorted_bound(self) -> Tensor:
        """(N, M'); with one token an image the cost itself, as only one plan is left: the product."""
        if self.tokens.shape[1] == 1:
            bound = torch.mm(self.tokens[:, 0], self.pool.means.T).neg_().add_(1)
        else:
            parts, rest = sorted_parts(self.tokens, PARTS)
            bound = torch.mm(parts, self.pool.parts.T).neg_().add_(1 - rest[:, None]).sub_(self.pool.rest)
        if self.weight:
            bound.mul_(1 - self.weight).add_(self._global_tile(slice(None), slice(None)))
        return bound.sub_(self.sorted_slack)

    def _global_tile(self, images: Tensor | slice, captions: Tensor | slice) -> Tensor:
        """λ·(1 − ⟨I, T⟩) (n, B) in float32."""
        if not self.weight:
            return self.bound.new_zeros(())
        assert self.pooled is not None and self.pool.pooled is not None
        return (1 - self.pooled[images] @ self.pool.pooled[captions].T).mul_(self.weight)

    def _global(self, i: Tensor, j: Tensor) -> Tensor:
        """λ·(1 − ⟨I, T⟩) (B,) of pairs in float64."""
        if not self.weight:
            return torch.zeros(len(i), dtype=torch.float64, device=self.device)
        assert self.pooled is not None and self.pool.pooled is not None
        return self.weight * (1 - (self.pooled[i].double() * self.pool.pooled[j].double()).sum(1))

    def _together(self, j: Tensor, least: int, cuda: int) -> int:
        """Pairs with these captions to take at a time: those whose costs are `TOGETHER`, or the least; on a GPU a number of its own."""
        if self.device.type != "cpu":
            return cuda
        return max(least, TOGETHER // (self.tokens.shape[1] * int(self.pool.length[j].amax())))

    def _costs(self, i: Tensor, j: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """C (B, P, L) and masses (B, L) of pairs."""
        captions = self.pool.tokens[self.pool.places(j).T].to(dtype)
        return 1 - torch.bmm(self.tokens[i].to(dtype), captions.mT), self.pool.masses(j).T

    def _raise(self, i: Tensor, j: Tensor, bound: Bound = reduced_bound, slack: float = 1.0) -> Tensor:
        """Bounds (B,) of pairs from float32 products, also written into `self.bound`; slack: how much `bound` magnifies rounding."""
        found = self.bound[i, j]
        if not len(i):
            return found
        for which in self.pool.length[j].argsort(stable=True).split(self._together(j, 64, 8192)):
            cost, masses = self._costs(i[which], j[which], torch.float32)
            inner, masses = cost.permute(1, 2, 0).masked_fill((masses.T == 0), torch.inf), masses.T
            transport = bound(inner, masses.new_full((len(inner), len(which)), 1 / len(inner)), masses)
            total = self._global(i[which], j[which]).float() + (1 - self.weight) * transport - slack * self.slack
            found[which] = found[which].fmax(total)  # not maximum: a bound that came to nothing (NaN) says nothing
        self.bound[i, j] = found
        return found

    def _solve(self, i: Tensor, j: Tensor) -> Tensor:
        """Distances (B,) of pairs in float64."""
        values = self._global(i, j)
        if self.weight == 1:
            return values
        self.solved += torch.bincount(i, minlength=len(self.solved))
        for which in torch.arange(len(i), device=self.device).split(self._together(j, 256, 4096)):
            cost, masses = self._costs(i[which], j[which], torch.float64)
            if self.epsilon:
                transport, _ = transport_cost(cost, b=masses, epsilon=self.epsilon, tol=TOL)
            else:
                lengths = self.pool.length[j[which]].tolist()
                matrices = cost.cpu().numpy()
                transport = cost.new_tensor([exact_cost(c[:, :size]) for c, size in zip(matrices, lengths, strict=True)])
            values[which] += (1 - self.weight) * transport
        return values

    def _survivors(self, shortlist: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pairs (i, j) that all bounds leave open."""
        limit = self._limit()
        wanted = self.bound <= limit
        if shortlist is not None:
            wanted &= torch.zeros_like(wanted).scatter_(1, shortlist, True)
        # Images with few captions left gather theirs; the others share blocks of the whole pool, at less than half the cost a pair. A
        # handful is not worth a look of its own: below, the handfuls of all images are bounded together.
        count = wanted.sum(1)
        shared = (count > 0.5 * wanted.shape[1] - 100) | wanted.is_cuda
        self._screen(shared.nonzero()[:, 0], torch.arange(wanted.shape[1], device=self.device), limit)
        for k in (~shared & (count > FEW)).nonzero()[:, 0].tolist():
            self._screen(torch.tensor([k], device=self.device), wanted[k].nonzero()[:, 0], limit)
        i, j = (wanted & (self.bound <= limit)).nonzero().unbind(1)
        if self.epsilon:
            self._raise(i, j, partial(entropic_bound, epsilon=self.epsilon), slack=ENTROPIC_SLACK)
        else:
            self._raise(i, j)
            i, j = self._still(i, j, limit)
            hard = torch.bincount(i, minlength=len(self.tokens))[i] > HARD
            self._raise(i[hard], j[hard], inner_sinkhorn_bound)
        return self._still(i, j, limit)

    def _limit(self) -> Tensor:
        """(N, 1) float32, at or above what a caption's bound may be for the caption to matter."""
        limit = (self.best + TIE).float()
        return limit.nextafter(torch.full_like(limit, torch.inf))[:, None]

    def _still(self, i: Tensor, j: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        left = self.bound[i, j] <= limit[i, 0]
        return i[left], j[left]

    def _screen(self, images: Tensor, captions: Tensor, limit: Tensor) -> None:
        """Raise `bound` of all pairs of these images and captions, in tiles that fit a core's cache."""
        if not len(images):
            return
        p = self.tokens.shape[1]
        group = max(1, min(len(images), 256 // p))
        entries = 2**19 if self.device.type == "cpu" else 2**28
        length = max(1, int(self.pool.length[captions].float().mean()))
        for block in captions.split(max(32, entries // (group * p * length))):
            masses = self.pool.masses(block)
            width = masses.numel()
            # oneDNN builds a kernel for every new shape, which takes longer than most of these products: hence few shapes.
            tokens = self.captions.index_select(0, F.pad(self.pool.places(block).flatten(), (0, -width % 512)))
            for rows in images.split(group):
                products = torch.mm(self.near[rows].flatten(0, 1), tokens.T)[:, :width]
                products = products.float().view(len(rows), p, len(masses), len(block))
                away = self._global_tile(rows, block) - self.slack - (1 - self.weight) * self.half_slack
                bound = one_sided_bound(products, masses).mul_(1 - self.weight).add_(away)
                k, c = (bound <= limit[rows]).nonzero().unbind(1)
                if len(k):
                    few = products[0].index_select(2, c) if len(rows) == 1 else products.permute(1, 2, 0, 3)[:, :, k, c]
                    reduced = reduced_bound(1 - few, few.new_full((p, len(c)), 1 / p), masses[:, c], padded=False)
                    bound[k, c] = (1 - self.weight) * reduced + away.expand_as(bound)[k, c]
                at = (rows[:, None], block)
                self.bound[at] = torch.maximum(self.bound[at], bound)

    def _best_first(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve pairs in the order of their bounds until the next bound exceeds the image's best.

        One pair an image a round; entropic rounds, which cost little more for more pairs, grow.
        """
        order = self.bound[i, j].argsort(stable=True)
        order = order[i[order].argsort(stable=True)]
        i, j = i[order], j[order]
        bound = self.bound[i, j]
        cost = torch.full_like(bound, torch.inf, dtype=torch.float64)
        ends = torch.bincount(i, minlength=len(self.tokens)).cumsum(0)
        at = torch.cat([ends.new_zeros(1), ends[:-1]])
        width = 1
        while True:
            now = at[:, None] + torch.arange(width, device=self.device)
            now = now[now < ends[:, None]]
            now = now[bound[now] <= self._limit()[i[now], 0]]
            if not len(now):
                return i, j, cost
            cost[now] = self._solve(i[now], j[now])
            self.best.scatter_reduce_(0, i[now], cost[now], "amin")
            at += width
            width = min(2 * width, 64) if self.epsilon else 1

    def _answer(self, i: Tensor, j: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image's solved pairs the nearest, of equals the lowest row of the pool; its distance; the next one's lead over it."""
        known = cost.isfinite()
        i, j, cost = i[known], j[known], cost[known]
        near = cost <= self.best[i] + TIE
        row = torch.full_like(self.solved, torch.iinfo(torch.int64).max)
        row.scatter_reduce_(0, i[near], self.pool.row[j[near]], "amin")
        chosen = self.pool.row[j] == row[i]
        distance = torch.empty_like(self.best)
        distance[i[chosen]] = cost[chosen]
        self.bound[i, j] = torch.inf
        others = self.bound.amin(1).double()
        others.scatter_reduce_(0, i[~chosen], cost[~chosen], "amin")
        return row, distance, others - distance


def _exact_products(device: torch.device) -> bool:
    """Whether float32 matrix products use all of their inputs' bits; TF32 and bf16 modes do not."""
    probe = torch.full((256, 128), 1 + 2.0**-12, device=device)
    return bool((probe @ torch.eye(128, device=device) == probe).all())


@contextmanager
def _whole_sums(cuda: bool) -> Iterator[None]:
    """cuBLAS may add parts of a bf16 product in bf16, which no margin here allows for."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    if cuda:
        matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        if cuda:
            matmul.allow_bf16_reduced_precision_reduction = before
