"""Certificates against brute force: every poisoning of a toy set, tried; and the joint bound re-derived."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from defenses import certify

CLASSES = 3


def toy(seed: int, n: int = 6) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    train, test = (F.normalize(torch.randn(count, 2, generator=draw), dim=1) for count in (n, 4))
    return train, np.random.default_rng(seed).integers(CLASSES, size=n), test


def poisonings(n: int, size: int) -> list[tuple[list[int], list[tuple[int, int]], list[int]]]:
    """All ways to change, add or remove `size` examples as seen by one test point: (kept rows, added (place, label), …).

    An attacker may put an example anywhere, so all that matters of it is its label and that it is near (0) or far (1).
    """
    found = []
    for removed in range(size + 1):
        for lost in itertools.combinations(range(n), removed):
            kept = [i for i in range(n) if i not in lost]
            # Every removed example may come back changed, and what is left of the budget may be new ones.
            for new in itertools.combinations_with_replacement(itertools.product((0, 1), range(CLASSES)), size):
                found.append((kept, list(new), list(lost)))
    return found


def votes_knn(similarity: np.ndarray, labels: np.ndarray, new: list[tuple[int, int]], kept: list[int], k: int) -> np.ndarray:
    ranked = [(-similarity[i], int(labels[i])) for i in kept] + [(-2.0 + 4 * far, label) for far, label in new]
    counts = np.zeros((1, CLASSES), dtype=np.int64)
    for _, label in sorted(ranked, key=lambda pair: pair[0])[:k]:
        counts[0, label] += 1
    return counts


def votes_rnn(near: np.ndarray, labels: np.ndarray, new: list[tuple[int, int]], kept: list[int]) -> np.ndarray:
    counts = np.zeros((1, CLASSES), dtype=np.int64)
    for label in [int(labels[i]) for i in kept if near[i]] + [label for far, label in new if not far]:
        counts[0, label] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 3, 4])
def test_knn_no_poisoning_of_the_certified_size_changes_a_prediction_and_one_more_can(seed: int, k: int) -> None:
    train, labels, test = toy(seed)
    votes = certify.knn_votes(train, labels, test, k, CLASSES)
    found, predicted = certify.radii(votes), certify.predictions(votes)
    similarity = (test @ train.T).numpy()
    for i in range(len(test)):
        assert found[i] >= 0
        for size in range(3):
            if len(labels) < k + size:  # the certificate asks for so many examples
                continue
            outcomes = {
                int(certify.predictions(votes_knn(similarity[i], labels, new, kept, k))[0])
                for kept, new, _ in poisonings(len(labels), size)
                if len(kept) + len(new) >= k
            }
            assert (outcomes == {predicted[i]}) == (size <= found[i]), (i, size, outcomes, votes[i])


@pytest.mark.parametrize("k", [1, 4, 5, 25])
def test_among_equally_near_rows_one_that_goes_exchanges_one_voter(k: int) -> None:
    """Duplicated images, as where each caption of an image is a row."""
    train, test = torch.tensor([[1.0, 0.0]]).repeat(60, 1), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    train[::4] = torch.tensor([0.0, 1.0])
    labels = (np.arange(60) >= 30).astype(int)
    whole = certify.knn_votes(train, labels, test, k, 2)
    assert (whole.sum(1) == k).all()
    for gone in range(60):
        kept = np.arange(60) != gone
        votes = certify.knn_votes(train[kept], labels[kept], test, k, 2)
        assert np.abs(votes - whole).sum(1).max() <= 2, gone


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("radius", [0.1, 0.8, 1.2])
def test_rnn_no_poisoning_of_the_certified_size_changes_a_prediction_and_one_more_can(seed: int, radius: float) -> None:
    train, labels, test = toy(seed)
    votes = certify.rnn_votes(train, labels, test, radius, CLASSES)
    found, predicted = certify.radii(votes), certify.predictions(votes)
    near = (1 - test @ train.T <= radius).numpy()
    for i in range(len(test)):
        if predicted[i] == certify.ABSTAINS:
            assert found[i] == -1
            continue
        for size in range(3):
            outcomes = {
                int(certify.predictions(votes_rnn(near[i], labels, new, kept))[0]) for kept, new, _ in poisonings(len(labels), size)
            }
            assert (outcomes == {predicted[i]}) == (size <= found[i]), (i, size, outcomes, votes[i])


def everywhere(near: np.ndarray, labels: np.ndarray, size: int) -> list[np.ndarray]:
    """The vote tables (m, C) after every poisoning of `size` that matters: each change takes an example away (or none) and puts one with
    some label near any subset of the test points."""
    m = len(near)
    subsets = list(itertools.product((0, 1), repeat=m))
    tables = []
    for removed in range(size + 1):
        for lost in itertools.combinations(range(len(labels)), removed):
            kept = [i for i in range(len(labels)) if i not in lost]
            base = np.stack([np.bincount(labels[[j for j in kept if near[i, j]]], minlength=CLASSES) for i in range(m)])
            for new in itertools.combinations_with_replacement(list(itertools.product(subsets, range(CLASSES))), size):
                changed = base.copy()
                for seen, label in new:
                    changed[:, label] += np.array(seen)
                tables.append(changed)
    return tables


@pytest.mark.parametrize("seed", range(12))
def test_no_single_poisoning_fells_more_of_a_group_than_the_joint_certificate_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=6)
    near = rng.random((3, 6)) < 0.7
    votes = np.stack([np.bincount(labels[row], minlength=CLASSES) for row in near])
    predicted = certify.predictions(votes)
    group = [int(np.flatnonzero(predicted == label)[0]) for label in range(CLASSES) if (predicted == label).any()]  # pairwise different
    for size in (0, 1):
        held = certify.hold_together(certify.costs(votes[group]), size)
        left = min(int((certify.predictions(table)[group] == predicted[group]).sum()) for table in everywhere(near, labels, size))
        assert held <= left


def test_the_joint_certificate_against_its_own_derivation() -> None:
    """Points fall only where removals Σ max(g − e, 0) fit into e: the largest such set, by trying all."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        cost, size = rng.integers(1, 9, size=rng.integers(1, 6)), int(rng.integers(0, 6))
        fallen = max(
            len(some)
            for count in range(len(cost) + 1)
            for some in itertools.combinations(range(len(cost)), count)
            if sum(max(cost[i] - size, 0) for i in some) <= size
        )
        assert certify.hold_together(cost, size) == len(cost) - fallen


def test_together_more_points_hold_than_one_by_one() -> None:
    """Ten points of ten classes with four votes each: each alone falls to 3 changes, but not many at once."""
    votes = 4 * np.eye(10, dtype=np.int64)
    labels, sizes = np.arange(10), np.array([0, 1, 2, 3])
    assert certify.individual(votes, labels, sizes).tolist() == [1, 1, 0.1, 0]  # class 0 wins its ties
    assert (certify.joint(votes, labels, sizes) >= certify.individual(votes, labels, sizes)).all()
    assert certify.joint(votes, labels, sizes).tolist() == [1, 1, 0.9, 0.7]  # g is 5 for class 0, 4 for the others


def test_shards_have_the_radius_of_partition_aggregation() -> None:
    rng = np.random.default_rng(1)
    votes = rng.multinomial(10, np.ones(4) / 4, size=200)
    a = votes.argmax(1)
    rest = votes + (np.arange(4) < a[:, None])
    rest[np.arange(200), a] = -99
    published = (votes[np.arange(200), a] - rest.max(1)) // 2
    assert (certify.radii(votes) == published).all()
    assert certify.radii(np.array([[10, 0, 0]])) == [5] and certify.radii(np.array([[0, 10, 0]])) == [4]


def test_votes_are_those_of_the_nearest() -> None:
    train = torch.eye(3)
    labels = np.array([2, 0, 0])
    test = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.9]]), dim=1)
    assert certify.knn_votes(train, labels, test, 1, 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert certify.rnn_votes(train, labels, test, 0.5, 3).tolist() == [[0, 0, 1], [2, 0, 0]]
    assert certify.predictions(certify.rnn_votes(train, labels, test, -1.0, 3)).tolist() == [-1, -1]
    with pytest.raises(ValueError, match="k=4"):
        certify.knn_votes(train, labels, test, 4, 3)


def test_a_wrong_point_is_certified_for_nothing() -> None:
    votes = np.array([[5, 0], [0, 5], [0, 0]])
    assert certify.individual(votes, np.array([0, 0, 0]), np.array([0, 1, 9])).tolist() == [1 / 3, 1 / 3, 0]
