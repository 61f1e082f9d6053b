"""SafeCLIP: the split, the growing safe set, both losses by hand, and what an epoch is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from defenses.base import ClipOutput, clip_loss
from defenses.safeclip import MixtureSelector, SafeCLIP, crossed, fit_mixture, neighbours, posteriors, unimodal

SPLIT = MixtureSelector(posterior=0.9, growth=0.01, most=0.85, least=0.1)


def two_groups(low: tuple[float, float], high: tuple[float, float], n: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(*low, n), rng.normal(*high, n)])


def test_the_mixture_finds_two_groups() -> None:
    weight, mean, variance = fit_mixture(two_groups((0.0, 0.1), (1.0, 0.2), 20_000))
    assert weight == pytest.approx([0.5, 0.5], abs=0.01)
    assert mean == pytest.approx([0, 1], abs=0.01)
    assert np.sqrt(variance) == pytest.approx([0.1, 0.2], abs=0.01)


def test_the_posterior_is_bayes_rule_where_it_need_not_be_bent() -> None:
    x = two_groups((0.0, 0.1), (1.0, 0.1))
    weight, mean, variance = fit_mixture(x)
    density = weight * np.exp(-((x[:, None] - mean) ** 2) / (2 * variance)) / np.sqrt(variance)
    middle = np.abs(x - 0.5) < 0.4
    np.testing.assert_allclose(posteriors(x)[middle], (density[:, 1] / density.sum(1))[middle], atol=1e-9)


@pytest.mark.parametrize(("low", "high"), [((0.0, 0.02), (0.3, 0.3)), ((0.0, 0.3), (0.3, 0.02))])
def test_the_wider_component_does_not_get_the_other_tail(low: tuple[float, float], high: tuple[float, float]) -> None:
    """By Bayes' rule alone the lowest (highest) values here belong to the other component for certain."""
    x = np.append(two_groups(low, high), [-3.0, 3.0])
    weight, mean, variance = fit_mixture(x)
    log = np.log(weight) - 0.5 * np.log(variance) - (x[:, None] - mean) ** 2 / (2 * variance)
    plain = 1 / (1 + np.exp(np.clip(log[:, 0] - log[:, 1], -500, 500)))
    order = np.argsort(x)
    assert (np.diff(plain[order]) < -1e-6).any(), "nothing to mend: the test is blind"
    assert (np.diff(posteriors(x)[order]) >= -1e-12).all()
    assert posteriors(x)[-2] == posteriors(x).min() and posteriors(x)[-1] == posteriors(x).max()


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=60))
def test_more_cosine_is_never_less_safe(values: list[float]) -> None:
    cosine = np.array(values, dtype=np.float32)
    for before in (None, 0.4):
        found = SPLIT.split(cosine, before)
        order = np.argsort(cosine, kind="stable")
        assert (np.diff(found.posterior[order]) >= -1e-6).all() and np.isfinite(found.posterior).all()
        assert cosine[found.safe].min() >= cosine[~found.safe].max(initial=-9)
        assert 2 <= found.safe.sum() <= max(2, int(0.85 * len(cosine)))


def test_equal_cosines_are_split_by_row_and_by_nothing_else() -> None:
    cosine = np.array([0.9, 0.1, 0.5, 0.5, 0.5, 0.5, 0.1, 0.2, 0.1, 0.1], dtype=np.float32)
    found = SPLIT.split(cosine, 0.29)
    assert found.share == pytest.approx(0.3) and np.flatnonzero(found.safe).tolist() == [0, 2, 3]


def test_the_safe_set_grows_by_its_share_up_to_its_bound() -> None:
    cosine = two_groups((0.0, 0.1), (1.0, 0.1), 500).astype(np.float32)
    share, sizes = None, []
    for _ in range(60):
        found = SPLIT.split(cosine, share)
        share = found.share
        sizes.append(int(found.safe.sum()))
    assert abs(sizes[0] - 500) < 10 and found.safe[500:].all()
    assert np.diff(sizes)[:30].tolist() == [10] * 30
    assert sizes[-1] == 850


def test_a_small_set_grows_too_though_each_step_is_less_than_a_pair() -> None:
    share, sizes = None, []
    for _ in range(20):
        found = MixtureSelector(posterior=0.9, growth=0.01, most=0.85, least=0.05).split(np.full(45, 0.3, dtype=np.float32), share)
        share = found.share
        sizes.append(int(found.safe.sum()))
    assert sizes == list(range(2, 22))


@pytest.mark.parametrize("posterior", [0.1, 0.5, 0.9])
def test_an_encoder_that_tells_nothing_apart_is_not_trusted(posterior: float) -> None:
    found = MixtureSelector(posterior, 0.02, 0.85, 0.05).split(np.full(1000, 0.3, dtype=np.float32), None)
    assert found.safe.sum() == 50


def test_where_no_pair_is_sure_the_best_few_are_safe() -> None:
    """One group and not two: no posterior reaches .9, and a set of two pairs could teach nothing."""
    assert SPLIT.split(np.full(50, 0.3, dtype=np.float32), None).safe.sum() == 5
    one_group = np.random.default_rng(0).uniform(-1, 1, 400).astype(np.float32)
    found = MixtureSelector(posterior=1.0, growth=0.01, most=0.85, least=0.1).split(one_group, None)
    assert found.safe.sum() == 40 and one_group[found.safe].min() >= np.sort(one_group)[-40]


def unit(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows), dim=1)


def test_neighbours_are_the_nearest_of_the_queue() -> None:
    queue = torch.eye(3)
    assert torch.equal(neighbours(unit([0.9, 0.1, 0.2], [0.1, 0.2, 0.9]), queue), queue[[0, 2]])
    own = unit([1.0, 2.0, 3.0])
    assert torch.equal(neighbours(own, queue[:0]), own) and torch.equal(neighbours(own, None), own)


def test_the_unimodal_loss_by_hand() -> None:
    a, b = unit([1.0, 0.1, 0.0], [0.1, 1.0, 0.0]), torch.eye(3)[:2]
    out = ClipOutput(a, a, torch.tensor(2.0), image_b=b, text_b=b.flip(0), image_queue=torch.eye(3), text_queue=torch.eye(3))
    good, bad = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert unimodal(out).item() == pytest.approx((good + bad) / 2, rel=1e-6)


def test_rows_of_one_neighbour_are_no_negatives_of_each_other() -> None:
    a, b = unit([1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [0.0, 1.0, 0.0]), torch.eye(3)[[0, 0, 1]]
    out = ClipOutput(a, a, torch.tensor(2.0), image_b=b, text_b=b, image_queue=torch.eye(3), text_queue=torch.eye(3))
    assert unimodal(out).item() == pytest.approx((2 * math.log(1 + math.exp(-2)) + math.log(1 + 2 * math.exp(-2))) / 3, rel=1e-6)


def test_captions_and_images_do_not_meet_in_the_unimodal_loss() -> None:
    leaves = [torch.randn(5, 4, requires_grad=True) for _ in range(4)]
    image, text, image_b, text_b = (F.normalize(x, dim=1) for x in leaves)
    method, scale = SafeCLIP(warmup=2), torch.tensor(3.0)
    first = ClipOutput(image, text, scale, image_b=image_b, text_b=text_b, image_queue=torch.eye(4), text_queue=torch.eye(4), epoch=2)
    loss = method.loss(first, clip_loss)
    assert loss == unimodal(first)
    loss.backward()
    assert leaves[0].grad is None and leaves[1].grad is None and leaves[2].grad.any() and leaves[3].grad.any()


def test_the_crossed_loss_by_hand() -> None:
    axes = torch.eye(2)
    out = ClipOutput(axes, axes, torch.tensor(3.0), image_b=axes.flip(0), text_b=axes)
    assert crossed(out).item() == pytest.approx((math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3))) / 2, rel=1e-6)


def test_an_epoch_is_what_the_paper_says() -> None:
    method = SafeCLIP(warmup=2, slow=0.05)
    assert [method.lr_factor(e) for e in range(1, 6)] == [1, 1, 0.05, 1, 1]
    assert [method.selector(e) is not None for e in range(1, 6)] == [False, False, False, True, True]
    longer = SafeCLIP(warmup=1, bridge=3, slow=0.5)
    assert [longer.lr_factor(e) for e in range(1, 6)] == [1, 0.5, 0.5, 0.5, 1]
    assert [longer.selector(e) is not None for e in range(1, 6)] == [False] * 4 + [True]
    draw = torch.Generator().manual_seed(0)
    image, text, image_b, text_b = (F.normalize(torch.randn(6, 4, generator=draw), dim=1) for _ in range(4))
    base = ClipOutput(image, text, torch.tensor(2.0), image_b=image_b, text_b=text_b, epoch=4)
    assert method.loss(base, clip_loss) == crossed(base)
    safe = torch.tensor([True, True, True, False, False, True])
    mixed = ClipOutput(image, text, torch.tensor(2.0), image_b=image_b, text_b=text_b, safe=safe, epoch=4)
    parts = [
        ClipOutput(*(x[rows] for x in (image, text)), torch.tensor(2.0), image_b=image_b[rows], text_b=text_b[rows])
        for rows in (safe, ~safe)
    ]
    assert method.loss(mixed, clip_loss).item() == pytest.approx((4 * crossed(parts[0]) + 2 * unimodal(parts[1])).item() / 6, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"warmup": 0}, {"bridge": 0}, {"slow": 0.0}, {"pool_size": 1}, {"posterior": 0.0}, {"growth": -0.1}, {"least": 0.9}, {"most": 1.5}],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SafeCLIP(**wrong)
