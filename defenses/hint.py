"""HINT: harden the linear probe with noise along which influence functions say that its loss on clean data falls.

Shapes: n examples, d features, C classes; x (n, d) standardised, with a column of ones behind as (n, d + 1); a head θ is (d + 1, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.base import Defense

BATCH = 128  # images a pass with gradient


@dataclass(frozen=True)
class HINT(Defense):
    """Train without defence; then harden the linear probe: noise on its most influential examples that lowers the loss on clean ones.

    Source: Van, Carey & Wu, "HINT: Healthy Influential-Noise based Training to Defend against Data Poisoning Attacks", ICDM 2023,
        arXiv 2309.08549. It is a method for supervised classifiers, and no version for CLIP is published: this one is for the probe on
        frozen features, a reconstruction.
    Assumes: labelled data of which some are poisoned (here the run's own attack, its pairs labelled as the adversary's class), and a
        few that are trusted (here pairs that the attack left alone). It does nothing for zero-shot use.
    Cost: after training, `steps` times: one fit of the head, one solve with its Hessian, and with where="pixels" about four passes of
        the image tower over the noisy share of the probe's images.
    Parameters:
        where: "pixels" (as in the paper): noise in the image, through the frozen encoder; "features": in its features (ours).
        steps: each fits the head anew (paper: at scheduled epochs of one training).
        step: how far a step goes at most, as a share of the bound (ours .2; the paper adds .1 times the raw gradient, ÷ 10 late).
        pixel_bound: largest change of a pixel in [0, 1] (paper 16/255).
        feature_bound: largest change of a feature, in its standard deviations (ours .5).
        share: examples that get noise, those of the largest influence (paper .5).
        damping: added to the Hessian (paper .01). The paper approximates its inverse by LiSSA; a logistic head's is exact here, by
            conjugate gradients on exact products.
        penalty: L2 on the head's weights, per mean loss (ours .01).
    Limits: it mends a probe, not the encoder: where the features of triggered images lie with the adversary's class, no head tells
        them apart. Noise fits the trusted examples: on an undefended model of the scenes (1,000 labelled examples, 37 poisoned, 250
        trusted, where="features") their loss fell from .42 to .08, held-out accuracy stayed (68.9 to 68.5 %), and so nearly did the
        backdoor (97.5 to 95.2 %). Influence is a first-order estimate around a head that is refitted each step.
    """

    where: Literal["pixels", "features"] = "pixels"
    steps: int = 5
    step: float = 0.2
    pixel_bound: float = 16 / 255
    feature_bound: float = 0.5
    share: float = 0.5
    damping: float = 0.01
    penalty: float = 0.01

    def __post_init__(self) -> None:
        if self.where not in ("pixels", "features"):
            raise ValueError(f'where={self.where!r}: give "pixels" or "features"')
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give 1 or more")
        for name in ("step", "pixel_bound", "feature_bound", "penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: give a share above 0 and up to 1")
        if self.damping < 0:
            raise ValueError(f"damping={self.damping}: give 0 or more")

    def hardener(self) -> HINT:
        return self

    def harden(self, x: Tensor, y: Tensor, valid: Tensor, valid_y: Tensor, classes: int, images: Images | None) -> Tensor:
        """Features (n, d) of the labelled examples, as the noise leaves them. x (n, d), valid (m, d): of any scale; y, valid_y: int64.

        images: their pixels and the way from pixels to features, where `where` is "pixels".
        """
        centre, scale = standards(x)
        ready = lambda features: (features.double() - centre) / scale
        x0, valid = ready(x), ready(valid)
        if self.where == "pixels":
            assert images is not None
            start, bound, box = images.pixels.float(), self.pixel_bound, (0.0, 1.0)
        else:
            start, bound, box = x0, self.feature_bound, (-torch.inf, torch.inf)
        noise, now = torch.zeros_like(start), x0
        for _ in range(self.steps):
            head = fit(now, y, classes, self.penalty)
            s = solve(head, now, y, gradient(head, valid, valid_y), self.penalty, self.damping)
            strong = influence(head, now, y, s).abs().topk(max(1, round(self.share * len(now)))).indices
            fresh = now.clone()
            for rows in strong.split(BATCH if images is not None else len(now)):
                shown = (start[rows] - noise[rows]).clamp(*box).requires_grad_()
                seen = ready(images.features(shown)) if self.where == "pixels" and images is not None else shown
                [slope] = torch.autograd.grad(influence(head, seen, y[rows], s).sum(), shown)
                slope = slope / slope.flatten(1).abs().amax(1).clamp(min=1e-30).view(-1, *[1] * (slope.ndim - 1))
                noise[rows] = (noise[rows] - self.step * bound * slope).clamp(-bound, bound)  # healthy is minus the slope, and is taken off
                with torch.no_grad():
                    changed = (start[rows] - noise[rows]).clamp(*box)
                    fresh[rows] = ready(images.features(changed)) if self.where == "pixels" and images is not None else changed
            now = fresh
        return now * scale + centre


class Images(NamedTuple):
    """Pixels in [0, 1] and the frozen encoder as a function with gradient."""

    pixels: Tensor  # (n, 3, S, S)
    features: Callable[[Tensor], Tensor]  # (b, 3, S, S) → (b, d)


def standards(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) in float64; 1 where a feature is constant."""
    x = x.double()
    scale = x.std(0, correction=0)
    return x.mean(0), torch.where(scale < 1e-6, torch.ones_like(scale), scale)


def _ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    """θ (d + 1, C), float64: the minimum of mean CE(x1·θ, y) + penalty/2·‖θ without its last row‖²."""
    x1 = _ones(x.detach().double())
    theta = torch.zeros(x1.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
    search = torch.optim.LBFGS(
        [theta], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(x1 @ theta, y) + penalty / 2 * theta[:-1].square().sum()
        value.backward()
        return value

    search.step(loss)  # type: ignore[no-untyped-call]
    return theta.detach()


def loss_of(theta: Tensor, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy of a head."""
    return float(F.cross_entropy(_ones(x.double()) @ theta, y))


def residuals(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(n, C): softmax(x1·θ) − one-hot of y."""
    return (_ones(x) @ theta).softmax(1) - F.one_hot(y, theta.shape[1]).to(x.dtype)


def gradient(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(d + 1, C): of the mean cross-entropy."""
    return _ones(x).T @ residuals(theta, x, y) / len(x)


def hessian_product(theta: Tensor, x: Tensor, v: Tensor, penalty: float, damping: float) -> Tensor:
    """H·v (d + 1, C) of what `fit` minimises, plus damping·v. Exact: H = mean x1 x1ᵀ ⊗ (diag p − p pᵀ) + penalty."""
    x1 = _ones(x)
    p = (x1 @ theta).softmax(1)
    u = p * (x1 @ v)
    u = u - p * u.sum(1, keepdim=True)
    kept = v.clone()
    kept[-1] = 0
    return x1.T @ u / len(x) + penalty * kept + damping * v


def solve(theta: Tensor, x: Tensor, y: Tensor, v: Tensor, penalty: float, damping: float) -> Tensor:
    """s = H⁻¹·v (d + 1, C) by conjugate gradients, to a residual of 1e-8 of v."""
    s, r = torch.zeros_like(v), v.clone()
    p, square = r.clone(), r.square().sum()
    goal = square * 1e-16
    for _ in range(10 * v.numel()):
        if square <= goal:
            break
        product = hessian_product(theta, x, p, penalty, damping)
        length = square / (p * product).sum()
        s, r = s + length * p, r - length * product
        new = r.square().sum()
        p, square = r + new / square * p, new
    return s


def influence(theta: Tensor, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """(n,): sᵀ∇_θ CE(x_i, y_i). To move x_i by δ changes the validation loss of a refitted head by −(1/n)·∇_x(this)ᵀδ, to first order."""
    return ((_ones(x) @ s) * residuals(theta, x, y)).sum(1)
