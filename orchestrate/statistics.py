"""The statistics of evaluation: intervals of shares and of means over seeds, the backdoor z-score, a logistic head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROBE_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse penalties that `logistic` tries
Z95 = 1.959964  # two-sided 95 % point of the standard normal


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval (low, high) in [0, 1] of a share with k hits in n trials; (0, 1) for no trials.

    Source: Wilson 1927, the roots of (k/n − p)² = z²·p(1 − p)/n. ValueError unless 0 ≤ k ≤ n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} hits in {n} trials is no share; hits must lie between 0 and the number of trials.")
    if n == 0:
        return 0.0, 1.0
    share, weight = k / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # Exact at the ends, where the roots are 0 and 1 and rounding would leave 1e-17.
    return (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


@dataclass(frozen=True)
class Share:
    """k hits in n trials, with the Wilson 95 % interval. `value`, `low` and `high` are shares in [0, 1]."""

    k: int
    n: int

    def __post_init__(self) -> None:
        wilson(self.k, self.n)  # refuses what is no share

    @property
    def value(self) -> float:
        """k/n; NaN for no trials."""
        return self.k / self.n if self.n else math.nan

    @property
    def low(self) -> float:
        return wilson(self.k, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.k, self.n)[1]

    def __str__(self) -> str:
        """As a table prints it, in per cent: `15/16 = 93.8 % [71.7, 98.9]`."""
        if not self.n:
            return "0/0"
        return f"{self.k}/{self.n} = {100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Interval:
    """A mean over n values and the half-width of its interval, in the values' unit; infinite for one value."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        spread = f" ± {self.half:.4g}" if math.isfinite(self.half) else ""
        return f"{self.mean:.4g}{spread} (n = {self.n})"


def mean_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Mean of independent values (one a seed) and Student's t interval: half = t(level, n − 1)·s/√n, s with n − 1.

    It is the interval of the mean, and not the spread of single runs; it may leave [0, 1] for shares. ValueError for no
    values or a level outside (0, 1).
    """
    numbers = [float(v) for v in values]
    if not numbers:
        raise ValueError("No values to average; give one number a seed.")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is no confidence level; give a share between 0 and 1, such as 0.95.")
    n = len(numbers)
    mean = math.fsum(numbers) / n
    if n == 1:
        return Interval(mean, math.inf, 1)
    from scipy.special import stdtrit  # only here: scipy is slow to import, and the command line reads this file

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in numbers) / (n - 1))
    return Interval(mean, float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n), n)


def cosine_zscore(triggered: NDArray[Any], clean: NDArray[Any]) -> float | None:
    """(mean pairwise cosine of triggered images − of clean images) / standard deviation of the clean pairs.

    Features (n, d), all n(n − 1)/2 pairs of different images. None where the deviation vanishes (fewer than three clean
    images, or equal ones). Exact in O(n·d²): over all ordered pairs Σ cos = ‖Σ x‖² and Σ cos² = ‖XᵀX‖², so there is no
    (n, n) matrix and no need to sample.
    """
    if len(clean) < 3 or len(triggered) < 2:
        return None
    mean, variance = _cosine_moments(clean)
    # The features come in float32: a smaller deviation is their rounding.
    return (_cosine_moments(triggered)[0] - mean) / math.sqrt(variance) if variance > 1e-12 else None


def _cosine_moments(features: NDArray[Any]) -> tuple[float, float]:
    """Mean and variance of the cosines of all pairs."""
    x = features.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = len(x) * (len(x) - 1)  # ordered; the n cosines of 1 with oneself are taken off
    mean = float((np.square(x.sum(0)).sum() - len(x)) / pairs)
    return mean, float((np.square(x.T @ x).sum() - len(x)) / pairs) - mean**2


def logistic(x: NDArray[Any], y: NDArray[Any], held: NDArray[np.bool_], test: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """Logistic regression (multinomial, L2, L-BFGS): predicted labels of `test` (m, d), and the C it was fitted with.

    x (n, d), y (n,) of at least two classes; features are standardised with the mean and deviation of x. C is the most
    accurate of PROBE_C on the rows `held` (n,) bool after a fit on the others, the smaller of equals; then all rows are
    fitted. The middle of PROBE_C where the others have one class only.
    """
    centre, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale[scale < 1e-6] = 1.0  # a constant float32 feature, exactly or but for rounding, must not be blown up
    x, test = (x - centre) / scale, (test - centre) / scale
    c = PROBE_C[len(PROBE_C) // 2]
    if held.any() and len(np.unique(y[~held])) > 1:
        model, found = _head(c), {}
        for tried in PROBE_C:  # ascending: each fit starts from the more penalised one before
            found[tried] = model.set_params(C=tried).fit(x[~held], y[~held]).score(x[held], y[held])
        c = max(PROBE_C, key=lambda tried: (found[tried], -tried))
    return _head(c).fit(x, y).predict(test), c


def logistic_head(x: NDArray[Any], y: NDArray[Any], test: NDArray[Any], c: float) -> NDArray[Any]:
    """Predicted labels of `test` (m, d) by a logistic regression of x (n, d), y (n,) with inverse penalty c: scaled by x alone.

    One class in y is predicted everywhere.
    """
    if len(np.unique(y)) < 2:
        return np.full(len(test), y[0])
    centre, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale[scale < 1e-6] = 1.0
    return _head(c).fit((x - centre) / scale, y).predict((test - centre) / scale)


def _head(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression  # slow to import, and only the probe needs it

    return LogisticRegression(C=c, solver="lbfgs", max_iter=1000, warm_start=True)
