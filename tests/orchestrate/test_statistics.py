"""Intervals against published figures and invariants, the z-score against all pairs, the logistic head on easy data."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrate.statistics import PROBE_C, Share, cosine_zscore, logistic, mean_interval, wilson

counts = st.integers(0, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(("k", "n", "low", "high"), [(15, 16, 0.717, 0.989), (0, 16, 0.0, 0.194), (2, 16, 0.035, 0.360)])
def test_wilson_gives_the_figures_of_the_literature(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-4)


@given(counts)
def test_wilson_solves_its_equation_and_holds_the_share(counted: tuple[int, int]) -> None:
    k, n = counted
    low, high = wilson(k, n)
    assert 0 <= low <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    if n:
        assert low <= k / n <= high
        for p in (low, high):
            assert n * (k / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p), abs=1e-9)


@given(counts)
def test_wilson_narrows_with_more_trials(counted: tuple[int, int]) -> None:
    k, n = counted
    low, high = wilson(k, n)
    more = wilson(4 * k, 4 * n)
    assert more[1] - more[0] <= high - low + 1e-12


def test_wilson_without_trials_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 9)[0] == 0 and wilson(9, 9)[1] == 1
    assert math.isnan(Share(0, 0).value) and str(Share(0, 0)) == "0/0"


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_no_share(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        Share(k, n)


def test_share_prints_like_a_table() -> None:
    share = Share(15, 16)
    assert str(share) == "15/16 = 93.8 % [71.7, 98.9]"
    assert (share.value, (share.low, share.high)) == (0.9375, wilson(15, 16))


def test_mean_interval_uses_students_t() -> None:
    found = mean_interval([1.0, 2.0, 3.0])  # s = 1, t(.975, 2) = 4.3027
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert (found.low, found.high) == pytest.approx((2 - found.half, 2 + found.half))
    assert str(found) == "2 ± 2.484 (n = 3)"
    assert mean_interval([1.0, 2.0, 3.0], level=0.5).half < found.half


def test_mean_of_one_seed_has_no_bounds() -> None:
    found = mean_interval([0.25])
    assert (found.mean, found.half, str(found)) == (0.25, math.inf, "0.25 (n = 1)")
    with pytest.raises(ValueError, match="No values"):
        mean_interval([])
    with pytest.raises(ValueError, match="level"):
        mean_interval([1.0, 2.0], level=95)


def _pairs(features: np.ndarray) -> np.ndarray:
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    return (x @ x.T)[np.triu_indices(len(x), 1)]


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 30), st.integers(2, 30), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_zscore_is_that_of_all_pairs(clean: int, triggered: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(triggered, width)) + 0.7, rng.normal(size=(clean, width))
    expected = (_pairs(a).mean() - _pairs(b).mean()) / _pairs(b).std()
    assert cosine_zscore(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_zscore_is_undefined_without_spread() -> None:
    same = np.ones((5, 4), dtype=np.float32)
    assert cosine_zscore(same, same) is None
    assert cosine_zscore(same, np.eye(4)[:2]) is None
    assert cosine_zscore(same[:1], np.eye(4)) is None


def test_logistic_separates_blobs_and_survives_a_constant_feature() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = np.concatenate([np.eye(3)[y] + rng.normal(0, 0.05, (90, 3)), np.full((90, 1), 0.3)], axis=1).astype(np.float32)
    held = np.arange(90) % 5 == 0
    guess, c = logistic(x[:60], y[:60], held[:60], x[60:])
    assert (guess == y[60:]).all()
    assert c in PROBE_C


def test_logistic_without_a_choice_takes_the_middle_penalty() -> None:
    x, y = np.array([[0.0], [1.0], [1.1]]), np.array([0, 1, 1])
    guess, c = logistic(x, y, np.array([True, False, False]), np.array([[-1.0], [2.0]]))
    assert c == PROBE_C[2]
    assert len(guess) == 2
