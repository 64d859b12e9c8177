"""Intervals, adjusted p values and verdicts.

The t-interval on per-replicate differences is used at every number of replicates: a percentile bootstrap covers badly
below twenty. Folds of one data set are not independent, since their training parts overlap; Nadeau and Bengio's
correction (Inference for the Generalization Error, Machine Learning 52, 2003) widens the interval for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["holds", "fails", "inconclusive"]


@dataclass(frozen=True)
class Interval:
    """An estimate of a mean: effect, ends of its interval, standard error and degrees of freedom."""

    effect: float
    low: float
    high: float
    se: float
    df: float
    n: int

    def p_value(self, null: float = 0.0) -> float:
        """Two-sided p value of the hypothesis that the true effect is `null`."""
        if not np.isfinite(self.se) or self.n < 2:
            return float("nan")
        if self.se == 0:
            return 1.0 if self.effect == null else 0.0
        return float(2 * stats.t.sf(abs(self.effect - null) / self.se, self.df))


def _interval(values: Sequence[float] | np.ndarray, variance_factor: float, level: float) -> Interval:
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    n = len(finite)
    if n < 2:
        mean = float(finite.mean()) if n else float("nan")
        return Interval(mean, -np.inf, np.inf, float("nan"), max(n - 1, 0), n)
    mean, se = float(finite.mean()), float(finite.std(ddof=1) * np.sqrt(variance_factor))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * se)
    return Interval(mean, mean - half, mean + half, se, n - 1, n)


def t_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """t-interval of the mean of independent replicates; missing values (NaN) are left out.

    Examples
    --------
    >>> round(t_interval([0.1, 0.2, 0.3]).low, 3)
    -0.048
    """
    n = int(np.isfinite(np.asarray(values, dtype=float)).sum())
    return _interval(values, 1 / max(n, 1), level)


def corrected_interval(values: Sequence[float] | np.ndarray, test_train_ratio: float, level: float = 0.95) -> Interval:
    """Nadeau-Bengio corrected resampled t-interval of the mean over folds of (repeated) cross-validation.

    Parameters
    ----------
    values : sequence
        One value per fold; NaN is left out.
    test_train_ratio : float
        Size of a test part divided by the size of its training part: 1 / (k - 1) for k folds.
    """
    if test_train_ratio <= 0:
        raise ValueError(f"test_train_ratio: expected a positive number, got {test_train_ratio}")
    n = int(np.isfinite(np.asarray(values, dtype=float)).sum())
    return _interval(values, 1 / max(n, 1) + test_train_ratio, level)


def bootstrap_groups(
    counts: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of pooled counts when whole groups are drawn with replacement.

    Parameters
    ----------
    counts : (G, ...) array
        What each of G groups adds to the pooled counts, such as its confusion matrices.
    statistic : callable
        Maps summed counts (B, ...) to (B,) values.
    n_boot : int
        Number of draws B.
    """
    groups = len(counts)
    drawn = statistic(np.tensordot(group_draws(groups, n_boot, seed), counts, axes=1))
    effect = float(statistic(counts.sum(axis=0, keepdims=True))[0])
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < n_boot / 2:
        return Interval(effect, -np.inf, np.inf, float("nan"), groups - 1, groups)
    low, high = np.quantile(finite, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(effect, float(low), float(high), float(finite.std(ddof=1)), groups - 1, groups)


@lru_cache(maxsize=1)
def group_draws(groups: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each group is drawn, (n_boot, groups); kept, since many metrics are drawn alike."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=n_boot).astype(np.float64)


def centred(found: Interval) -> Interval:
    """Put the interval of a calibration error around its estimate: plus and minus 1.96 standard errors, at least 0.

    Every draw of a bootstrap adds noise to the absolute errors of the bins, so that its percentiles lie too high.
    """
    low, high = found.effect - 1.96 * found.se, found.effect + 1.96 * found.se
    return replace(found, low=max(low, 0.0), high=high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p values, in the given order; NaN stays NaN and is not counted.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = running
    return [float(value) for value in adjusted]


def detectable_effect(interval: Interval, level: float = 0.95, power: float = 0.8) -> float:
    """Smallest true effect that a study with this standard error would have found with the given power."""
    if interval.n < 2 or not np.isfinite(interval.se):
        return float("inf")
    return float((stats.t.ppf(0.5 + level / 2, interval.df) + stats.t.ppf(power, interval.df)) * interval.se)


def region_p_values(interval: Interval, above: float | None, below: float | None) -> tuple[float, float]:
    """P values for "the effect lies inside the region" and "outside" (each 1 if nothing speaks for it).

    They match the interval: at level 1 - a, it lies wholly inside (outside) exactly if the first (second) is below a.
    """

    def beyond(limit: float, direction: int) -> float:
        if interval.n < 2 or not np.isfinite(interval.se):
            return 1.0
        distance = direction * (interval.effect - limit)
        if interval.se == 0:
            return 0.0 if distance > 0 else 1.0
        return float(min(1.0, 2 * stats.t.sf(distance / interval.se, interval.df)))

    inside, outside = [], []
    if above is not None:
        inside.append(beyond(above, 1))
        outside.append(beyond(above, -1))
    if below is not None:
        inside.append(beyond(below, -1))
        outside.append(beyond(below, 1))
    if not inside:
        raise ValueError("a check needs `above`, `below` or `within`")
    return max(inside), min(outside)


def verdict(p_inside: float, p_outside: float, alpha: float = 0.05) -> Verdict:
    """``holds`` if the interval lies inside the region, ``fails`` if outside, else ``inconclusive``."""
    if p_inside < alpha:
        return "holds"
    return "fails" if p_outside < alpha else "inconclusive"
