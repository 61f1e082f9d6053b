"""HINT: the head, its Hessian and the influence of an example, each against a direct computation; and that its steps lower the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from defenses import hint
from defenses.hint import HINT, Images

N, D, CLASSES, PENALTY = 60, 5, 3, 0.05


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labelled examples, a fifth of them mislabelled, and clean ones."""
    draw = torch.Generator().manual_seed(seed)
    way = torch.randn(D, CLASSES, generator=draw, dtype=torch.float64)
    x, valid = (torch.randn(n, D, generator=draw, dtype=torch.float64) for n in (N, 40))
    y, valid_y = (x @ way).argmax(1), (valid @ way).argmax(1)
    y[: N // 5] = (y[: N // 5] + 1) % CLASSES
    return x, y, valid, valid_y


def objective(theta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = torch.cat([x, x.new_ones(len(x), 1)], 1) @ theta.view(D + 1, CLASSES)
    return torch.nn.functional.cross_entropy(logits, y) + PENALTY / 2 * theta.view(D + 1, CLASSES)[:-1].square().sum()


def test_the_head_is_the_optimum() -> None:
    x, y, _, _ = problem()
    theta = hint.fit(x, y, CLASSES, PENALTY)
    known = LogisticRegression(C=1 / (PENALTY * N), tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(theta[:-1].T - theta[:-1].T.mean(0), known.coef_ - known.coef_.mean(0), atol=1e-5)


def test_the_product_with_the_hessian_is_exact() -> None:
    x, y, valid, valid_y = problem()
    theta = hint.fit(x, y, CLASSES, PENALTY)
    hessian = torch.autograd.functional.hessian(lambda t: objective(t, x, y), theta.flatten())
    v = hint.gradient(theta, valid, valid_y)
    product = hint.hessian_product(theta, x, v, PENALTY, 0.01)
    torch.testing.assert_close(
        product.flatten(), (hessian + 0.01 * torch.eye(len(hessian), dtype=torch.float64)) @ v.flatten(), rtol=1e-9, atol=1e-12
    )
    s = hint.solve(theta, x, y, v, PENALTY, 0.01)
    torch.testing.assert_close(
        s.flatten(), torch.linalg.solve(hessian + 0.01 * torch.eye(len(hessian), dtype=torch.float64), v.flatten()), rtol=1e-6, atol=1e-9
    )


def test_a_small_step_lowers_the_validation_loss_of_a_refitted_head_by_what_influence_says() -> None:
    x, y, valid, valid_y = problem()
    theta = hint.fit(x, y, CLASSES, PENALTY)
    v = hint.gradient(theta, valid, valid_y)
    s = hint.solve(theta, x, y, v, PENALTY, 0.0 + 1e-9)  # the bias has a null direction, which damping closes
    leaf = x.clone().requires_grad_()
    [slope] = torch.autograd.grad(hint.influence(theta, leaf, y, s).sum(), leaf)
    size = 1e-3
    up, down = (hint.loss_of(hint.fit(x + sign * size * slope, y, CLASSES, PENALTY), valid, valid_y) for sign in (1, -1))
    assert up < hint.loss_of(theta, valid, valid_y) < down
    assert (up - down) / (2 * size) == pytest.approx(-float(slope.square().sum()) / N, rel=1e-3)


def test_removing_an_example_does_what_its_influence_says() -> None:
    x, y, valid, valid_y = problem()
    theta = hint.fit(x, y, CLASSES, PENALTY)
    s = hint.solve(theta, x, y, hint.gradient(theta, valid, valid_y), PENALTY, 1e-9)
    told = hint.influence(theta, x, y, s) / N  # removing i changes the loss by this, to first order
    done = []
    for i in range(0, N, 4):
        rest = torch.arange(N) != i
        # N − 1 examples at the weight of N: the penalty keeps its size beside them.
        theta_i = hint.fit(x[rest], y[rest], CLASSES, PENALTY * N / (N - 1))
        done.append(hint.loss_of(theta_i, valid, valid_y) - hint.loss_of(theta, valid, valid_y))
    assert np.corrcoef(told[::4].numpy(), done)[0, 1] > 0.97


@pytest.mark.parametrize("where", ["features", "pixels"])
def test_noise_lowers_the_loss_on_clean_examples_and_keeps_its_bounds(where: str) -> None:
    x, y, valid, valid_y = problem(1)
    way = torch.randn(48, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pixels = torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    features = lambda some: some.double().flatten(1) @ way
    shown: list[torch.Tensor] = []

    def seen(some: torch.Tensor) -> torch.Tensor:
        shown.append(some.detach())
        return features(some)

    if where == "pixels":  # labels that the pictures' own features explain, some of them wrong
        x = features(pixels)
        y = (x - x.mean(0))[:, :CLASSES].argmax(1)
        valid, valid_y = x[30:].clone(), y[30:].clone()
        y[:12] = (y[:12] + 1) % CLASSES
    method = HINT(where=where, steps=4, damping=1e-6, share=0.5, penalty=PENALTY)
    changed = method.harden(x, y, valid, valid_y, CLASSES, Images(pixels, seen) if where == "pixels" else None)
    centre, scale = hint.standards(x)
    losses = [
        hint.loss_of(hint.fit((some - centre) / scale, y, CLASSES, PENALTY), (valid - centre) / scale, valid_y) for some in (x, changed)
    ]
    assert losses[1] < losses[0]
    if where == "features":
        assert ((changed - x).abs() <= 0.5 * scale * (1 + 1e-9)).all()
        assert (changed != x).any(1).sum() >= N // 2
    else:
        assert all(some.min() >= 0 and some.max() <= 1 for some in shown)
        strong = [some for some in shown if len(some) == N // 2]
        far = max(min(float((some[i] - pixels[j]).abs().max()) for j in range(N)) for some in strong for i in range(3))
        assert 0 < far <= 16 / 255 + 1e-6


@pytest.mark.parametrize("wrong", [{"where": "text"}, {"steps": 0}, {"step": 0.0}, {"share": 0.0}, {"damping": -1.0}, {"penalty": 0.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HINT(**wrong)
