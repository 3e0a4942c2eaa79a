"""How sure a mean over few cases is, and whether two sets of scores differ: pure functions of arrays.

The case is the unit everywhere: classes and voxels of one scan are not independent of each other. Every function takes
a seed and gives the same numbers again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 9999


class Interval(NamedTuple):
    low: float
    high: float


def bootstrap_interval(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of values (cases,), resampling cases: BCa bootstrap.

    NaN are left out. The point itself if all values are equal or there is one; NaN if there is none. With fewer than
    about ten cases it is too narrow.
    """
    kept = values[~np.isnan(values)]
    return _bca(kept.size, lambda rows: kept[rows].mean(axis=-1), level, seed)


def mean_of_class_means(values: np.ndarray) -> float:
    """values (cases, classes): mean over the classes of each one's mean over its cases that are not NaN.

    A class with no value at all is left out; NaN if that is every class.
    """
    return float(_mean_of_class_means(values))


def class_mean_interval(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of mean_of_class_means, resampling cases with all their classes together: BCa bootstrap.

    A class without a value in a resample is left out of that resample's mean; one case or no spread: the point itself.
    """
    kept = values[~np.isnan(values).all(axis=1)]
    return _bca(len(kept), lambda rows: _mean_of_class_means(kept[rows]), level, seed)


@dataclass(frozen=True)
class PairedTest:
    """The same cases scored twice. difference: mean of first - second; low, high: its 95 % bootstrap interval.

    cases: pairs in which neither value is NaN; differing: those of them whose values differ. wilcoxon_p, permutation_p:
    two-sided.
    """

    cases: int
    differing: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    wilcoxon_p: float
    permutation_p: float

    @property
    def smallest_p(self) -> float:
        """What either test could reach at best with so many cases that differ."""
        return min(1.0, 2.0 ** (1 - self.differing))

    @property
    def note(self) -> str:
        """What keeps this test from saying anything, if something does."""
        if self.cases == 0:
            return "no case was scored on both sides"
        if self.differing == 0:
            return "no case differs"
        if self.smallest_p >= 0.05:
            return f"cases that differ: {self.differing}, so p < 0.05 is out of reach, at best {self.smallest_p:.3g}"
        return ""


def paired_test(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> PairedTest:
    """Compare two scores (cases,) of the same cases: Wilcoxon's signed ranks and a permutation of signs of the mean.

    A pair with a NaN is left out. Cases that do not differ say nothing to either test; below 6 that do, no two-sided
    test of signs can reach p < 0.05. Up to 13 that do, both p are exact; beyond, the permutation draws 9999 times and
    Wilcoxon's ties take the normal approximation. Raises ValueError if the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a paired test needs one value per case on both sides, got {first.shape} and {second.shape}.")
    kept = ~(np.isnan(first) | np.isnan(second))
    first, second = first[kept], second[kept]
    if not first.size:
        return PairedTest(0, 0, *[float("nan")] * 7)
    difference = first - second
    differing = difference[difference != 0]
    wilcoxon_p = permutation_p = 1.0
    if differing.size:
        _, wilcoxon_p = np.asarray(stats.wilcoxon(differing), float).tolist()
        permutation_p = _sign_permutation_p(differing, seed)
    return PairedTest(
        int(first.size),
        int(differing.size),
        float(first.mean()),
        float(second.mean()),
        float(difference.mean()),
        *bootstrap_interval(difference, seed=seed),
        wilcoxon_p,
        permutation_p,
    )


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values adjusted for having tested them all, by Holm's step-down; NaN stay NaN and do not count."""
    p = np.asarray(p_values, float)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(order.size, 0, -1)))
    return adjusted


def _sign_permutation_p(difference: np.ndarray, seed: int) -> float:
    """Two-sided p of the sum of differences among all their signs: all of them if there are few, else drawn ones."""
    cases = difference.size
    every_sign = 2**cases <= RESAMPLES
    if every_sign:
        signs = 1 - 2 * (np.arange(2**cases)[:, None] >> np.arange(cases) & 1)
    else:
        signs = np.random.default_rng(seed).choice((-1, 1), size=(RESAMPLES, cases))
    sums, observed = np.abs(signs @ difference), abs(difference.sum())
    # equal sums taken in another order may differ in the last digit
    extreme = np.count_nonzero(sums >= observed - 1e-9 * np.abs(difference).sum())
    return float(extreme / len(signs) if every_sign else (extreme + 1) / (len(signs) + 1))


def _mean_of_class_means(values: np.ndarray) -> np.ndarray:
    """values (..., cases, classes) -> (...)."""
    present = ~np.isnan(values)
    cases = present.sum(axis=-2)
    class_means = np.where(present, values, 0).sum(axis=-2) / np.maximum(cases, 1)
    classes = (cases > 0).sum(axis=-1)
    return np.where(classes > 0, class_means.sum(axis=-1) / np.maximum(classes, 1), np.nan)


def _bca(cases: int, statistic: Callable[[np.ndarray], np.ndarray], level: float, seed: int) -> Interval:
    """statistic: row indices (..., n) -> (...)."""
    if cases == 0:
        return Interval(float("nan"), float("nan"))
    rows = np.arange(cases)
    point = float(statistic(rows))
    if cases == 1:
        return Interval(point, point)
    leaving_one_out = statistic(np.array([np.delete(rows, row) for row in rows]))
    # the correction for skewness divides by their spread
    if np.ptp(leaving_one_out) <= 1e-12 * max(1.0, abs(point)):
        return Interval(point, point)
    result = stats.bootstrap(
        (rows,),
        lambda sample, axis: statistic(np.moveaxis(sample, axis, -1)),
        n_resamples=RESAMPLES,
        batch=1000,
        vectorized=True,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))
