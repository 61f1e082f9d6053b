"""OTCCLIP: captions re-assigned, and pairs aligned, by optimal transport between the local features of images and captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from defenses.base import ClipOutput, Features, LossFn, Match, Matcher
from defenses.matching import CosineMatcher
from defenses.roclip import RoCLIP
from defenses.token_pool import TokenPool
from defenses.transport import transport_cost
from defenses.transport_matching import share_nearer, transport_nearest, transport_pairs

_READY: Any = WeakTensorKeyDictionary()  # a pool's tokens → its TokenPool: matching comes in batches, the pool stays


@dataclass(frozen=True)
class TransportMatcher:
    """The caption with the least weight·(1 − cosine of the pooled features) + (1 − weight)·transport cost of the tokens, exactly.

    With `move` below 1 only that share of all pairs is re-paired; `match` then measures each image's own caption too.
    """

    pool_size: int | float = 0.02
    matched: Literal["embedding", "caption"] = "caption"
    tokens: bool = True
    look: float = 0.0
    move: float = 1.0
    epsilon: float = 0.1
    weight: float = 0.5
    approximate: int = 0

    name = "transport"  # class constant

    @property
    def beside(self) -> Mapping[str, Matcher]:
        return {"cosine": CosineMatcher()}

    def match(self, images: Features, pool: Features, own: Features | None = None) -> Match:
        """own: features of each image's own caption, where `move` is below 1. The pool must not change in place."""
        assert images.tokens is not None and pool.tokens is not None
        if pool.tokens not in _READY:
            _READY[pool.tokens] = TokenPool(pool.tokens, pool.mask, pool.pooled)
        found = transport_nearest(
            images.tokens,
            _READY[pool.tokens],
            epsilon=self.epsilon,
            weight=self.weight,
            image_global=images.pooled,
            approximate=self.approximate or None,
        )
        if own is None:
            return found
        distance = transport_pairs(images, own, epsilon=self.epsilon, weight=self.weight)
        nearer = share_nearer(images, _READY[pool.tokens], distance, epsilon=self.epsilon, weight=self.weight)
        return found._replace(own_distance=distance, nearer=nearer)


@dataclass(frozen=True)
class OTCCLIP(RoCLIP):
    """RoCLIP with optimal transport: between image patches and words, for finding the caption and for aligning the pair.

    Source: Zhang et al., "OTCCLIP", EMNLP 2025, arXiv 2509.18717. No code is published, nor are token layer, ε, iterations, pool
        size, frequency and loss weights: this is a reconstruction, and "ours" below marks every choice the paper leaves open.
    Assumes: what RoCLIP assumes, of sets of local features: a poisoned image's patches lie nearer to the words of captions of what it
        shows than to the adversary's.
    Cost: RoCLIP's, with token features; matching itself takes about 1 to 4 ms of one core an image against 4,000 captions (see
        `benchmarks/transport.py`). The losses add 1 + 2·negatives transport problems a pair, about 10 µs each; beta > 0 encodes
        every batch twice.
    Parameters (and RoCLIP's; `every`, `pool_size`, `warmup` are its defaults, ours):
        weight: λ, share of the global cosine distance in matching, 0 to 1 (ours .5; the paper combines both, its weight is not public).
        epsilon: entropic regularisation in matching, in units of cost; 0 = exact transport (ours .1, as in PLOT). At .1 a plan is close
            to the independent coupling, whose cost is 1 − the product of the mean tokens; at 0 words choose their patches.
        matched: "caption" (ours): the matched caption is encoded again, as the losses need its tokens.
        alpha: weight of the inter-modal loss (ours .1): an image's tokens against its caption's.
        beta: weight of the intra-modal loss (ours .1): the mean transport cost between two augmented views of an image, and of its caption.
        loss_epsilon: ε of the losses' plans, above 0 (ours .1).
        negatives: k; with k > 0 the inter-modal loss is contrastive, the pair's transport cost against those of the k captions (and k
            images) of the batch that the global features confuse most; 0 = the plain mean of the pairs' costs (ours 4).
        align: which pairs the inter-modal loss aligns: "robust" (ours): all of a robust epoch, re-paired ones with their new captions and,
            where `move` is below 1, the others with their own, poisoned pairs that stay among them; "moved" (ours): the re-paired ones
            alone, each with the weight that it has among all; "always": all, in every epoch.
        approximate: consider only so many captions an image, those with the lowest bound; 0 (ours): all, exactly.
        Tokens (ours): patches through the projection of the pooled feature; words through the text projection, without start token
        and padding; cost 1 − cosine; uniform masses. Plans are detached: gradients flow through the costs only (ours).
    Limits: those of RoCLIP. Matching follows the token features, so a model whose tokens say little (first epochs) matches badly; use
        `warmup`. A pool of few captions gives many images the same one; those count as no negatives only if encoded alike.
    """

    needs_tokens = True

    matched: Literal["embedding", "caption"] = "caption"
    weight: float = 0.5
    epsilon: float = 0.1
    alpha: float = 0.1
    beta: float = 0.1
    loss_epsilon: float = 0.1
    negatives: int = 4
    align: Literal["robust", "moved", "always"] = "robust"
    approximate: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: give the share of the global distance, 0 to 1")
        if self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon}: give 0 (exact transport) or more")
        if self.loss_epsilon <= 0:
            raise ValueError(f"loss_epsilon={self.loss_epsilon}: give a number above 0; small ones approach exact transport")
        for name in ("alpha", "beta", "negatives", "approximate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 (off) or more")
        if self.align not in ("robust", "moved", "always"):
            raise ValueError(f'align={self.align!r}: give "robust", "moved" or "always"')
        if self.matched == "embedding" and (self.alpha or self.beta):
            raise ValueError('matched="embedding" leaves the losses without tokens: give matched="caption", or alpha=0 and beta=0')

    @property
    def view_count(self) -> int:
        return 2 if self.beta else 1

    def matcher(self, epoch: int) -> Matcher | None:
        if not self.robust(epoch):
            return None
        return TransportMatcher(self.pool_size, self.matched, True, self.look, self.move, self.epsilon, self.weight, self.approximate)

    def loss(self, out: ClipOutput, base: LossFn) -> Tensor:
        total = base(out)
        with torch.autocast(out.image.device.type, enabled=False):  # costs are differences of nearly equal numbers
            if self.alpha and (out.robust or self.align == "always"):
                rows = out.moved.nonzero().flatten() if self.align == "moved" and out.moved is not None else None
                total = total + self.alpha * inter_modal(out, self.loss_epsilon, self.negatives, rows)
            if self.beta:
                total = total + self.beta * intra_modal(out, self.loss_epsilon)
        return total


def inter_modal(out: ClipOutput, epsilon: float, negatives: int, rows: Tensor | None = None) -> Tensor:
    """Scalar. negatives = 0: mean_i d(i, i). Else ½[CE(−s·d(i, {i} ∪ H_i)) + CE(−s·d({i} ∪ H'_i, i))], label: the pair itself.

    rows (R,): the pairs that are aligned, all N unless given; the mean is over N either way, and every pair may be a negative.

    d: transport cost between image and caption tokens; s: the model's logit scale, detached; H_i: the captions, H'_i: the images with
    the largest global cosine to the pair's other side. A caption encoded like the pair's own is no negative.
    """
    assert out.image_tokens is not None and out.text_tokens is not None and out.text_mask is not None
    count = len(out.image)
    own = torch.arange(count, device=out.image.device) if rows is None else rows
    if not len(own):
        return out.image.new_zeros((), dtype=torch.float32)
    share = len(own) / count
    image, text = out.image.detach().float(), out.text.detach().float()
    negatives = min(negatives, count - 1)
    with torch.no_grad():
        cosine = (image @ text.T).masked_fill(text @ text.T > 1 - 1e-5, -torch.inf).fill_diagonal_(-torch.inf)
        by_image, by_text = (x[own].topk(negatives, dim=1) for x in (cosine, cosine.T))
    columns = own.repeat_interleave(negatives)
    distance = pair_costs(
        out.image_tokens,
        out.text_tokens,
        torch.cat([own, columns, by_text.indices.flatten()]),
        torch.cat([own, by_image.indices.flatten(), columns]),
        epsilon,
        mask_y=out.text_mask,
    )
    pair, rest = distance[: len(own), None], distance[len(own) :].view(2, len(own), negatives)
    if not negatives:
        return pair.mean() * share
    scale = out.scale.detach()
    loss = pair.new_zeros(())
    for others, found in zip(rest, (by_image, by_text), strict=True):
        logits = torch.cat([-scale * pair, (-scale * others).masked_fill(found.values.isinf(), -torch.inf)], 1)
        loss = loss + F.cross_entropy(logits, torch.zeros_like(own)) / 2
    return loss * share


def intra_modal(out: ClipOutput, epsilon: float) -> Tensor:
    """Scalar: ½(mean transport cost between two views of each image + that between two views of each caption)."""
    assert out.image_tokens is not None and out.image_tokens_b is not None
    assert out.text_tokens is not None and out.text_tokens_b is not None
    own = torch.arange(len(out.image), device=out.image.device)
    images = pair_costs(out.image_tokens, out.image_tokens_b, own, own, epsilon)
    texts = pair_costs(out.text_tokens, out.text_tokens_b, own, own, epsilon, out.text_mask, out.text_mask_b)
    return (images.mean() + texts.mean()) / 2


def pair_costs(
    x: Tensor, y: Tensor, i: Tensor, j: Tensor, epsilon: float, mask_x: Tensor | None = None, mask_y: Tensor | None = None
) -> Tensor:
    """⟨T, C⟩ (B,) of the sets x[i] and y[j], C = 1 − ⟨x, y⟩, T the entropic plan, through which no gradient flows.

    x (N, P, d), y (M, L, d), i and j (B,); masks (N, P), (M, L): False = padding. Neither the gathered tokens (B, P, d) nor the costs
    are kept for the backward pass, only the plans.
    """
    masses = []
    for tokens, mask in ((x, mask_x), (y, mask_y)):
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask.float()
        masses.append(mask / mask.sum(1, keepdim=True))
    costs: Tensor = _PairCosts.apply(x.float(), y.float(), i, j, masses[0], masses[1], epsilon)
    return costs


class _PairCosts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, i: Tensor, j: Tensor, a: Tensor, b: Tensor, epsilon: float) -> Tensor:
        values, plans = x.new_empty(len(i)), x.new_empty(len(i), x.shape[1], y.shape[1])
        for part in _parts(x, y, i):
            cost = torch.bmm(x[i[part]], y[j[part]].mT).neg_().add_(1)
            values[part], plans[part] = transport_cost(cost, a[i[part]], b[j[part]], epsilon=epsilon)
        ctx.save_for_backward(x, y, i, j, plans)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, i, j, plans = ctx.saved_tensors
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for part in _parts(x, y, i):
            plan = plans[part] * -grad[part, None, None]
            dx.index_add_(0, i[part], torch.bmm(plan, y[j[part]]))
            dy.index_add_(0, j[part], torch.bmm(plan.mT, x[i[part]]))
        return dx, dy, None, None, None, None, None


def _parts(x: Tensor, y: Tensor, i: Tensor) -> list[slice]:
    """Pairs whose gathered tokens take about 64 MB."""
    step = max(1, 2**24 // ((x.shape[1] + y.shape[1]) * x.shape[2]))
    return [slice(low, low + step) for low in range(0, len(i), step)]
