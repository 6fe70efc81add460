"""What a comparison may claim: inference over training runs, and how well they were measured.

The unit of replication is the *training run* (a seed). Its test episodes say how well one trained
model was measured, not how the rule does: with a spread over seeds three times that of the
measurement, a 95% interval over episodes holds the true difference about half of the time. For a rule
and a baseline that were trained on the seeds s = 1 ... S,

    d_s = mean over objectives of the mean over test episodes of (rule - baseline),

the same episodes and initial weights for both. `over_seeds` gives the mean of d_s with its t interval
and the p-value of the paired t test, `holm` adjusts the p-values of a table, and `verdict` says in a
word what may be claimed. `over_episodes` is the precision of the measurement, and no more.

Everything here is a pure function of arrays. No result is NaN, and no argument may be. After
Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice",
Bouthillier et al. 2021, "Accounting for variance in machine learning benchmarks", and Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gametalearn.errors import InputError

__all__ = [
    "FEWEST",
    "LARGEST",
    "LEVEL",
    "Estimate",
    "ahead",
    "half_width",
    "holm",
    "over_episodes",
    "over_seeds",
    "seeds_needed",
    "stratified_error",
    "stratified_mean",
    "verdict",
]

Array = np.ndarray[Any, np.dtype[np.float64]]

FEWEST = 3
"""Seeds from which on there is an interval; with two, its width is a matter of luck."""

LEVEL = 0.05
"""A verdict needs an adjusted p-value below it; intervals are of 95%."""

POWER = 0.8
"""The chance that `seeds_needed` asks for."""

LARGEST = 1e300
"""A value beyond it has no mean that a float can hold."""

EQUAL = 1e-9
"""Differences that vary by less than this, relative to the largest, are equal up to rounding."""

MOST_SEEDS = 10_000
"""Where `seeds_needed` stops counting."""


@dataclass(frozen=True)
class Estimate:
    """A mean and what is known of it.

    Attributes:
        mean: the mean.
        half: half width of its 95% interval; None where there are too few values for one.
        p_value: two-sided, of the t test that the mean is zero; None where there is no interval, and
            for values that are equal and not zero, which do not show how much they vary.
    """

    mean: float
    half: float | None = None
    p_value: float | None = None

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The 95% interval of the mean."""
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)


def over_seeds(values: ArrayLike) -> Estimate:
    """The mean of one value for each seed, its t interval and p-value.

    With mean m and standard deviation s (S - 1 degrees of freedom) the interval is m +/- t_{S-1} s /
    sqrt(S), as `scipy.stats.ttest_1samp` gives it; of d_s it is the paired t test.

    Args:
        values: ``(S,)``, S >= 1. With S < 3 there is neither interval nor p-value. Values that are all
            zero have the interval [0, 0] and a p-value of 1, other equal values no p-value.

    >>> found = over_seeds([-0.02, -0.03, -0.01])
    >>> round(found.mean, 4), round(found.half, 4), round(found.p_value, 4)
    (-0.02, 0.0248, 0.0742)
    """
    array = _finite(values, "over_seeds: values")
    mean = float(array.mean())
    if len(array) < FEWEST:
        return Estimate(mean)
    scale = float(np.abs(array).max()) or 1.0
    error = float((array / scale).std(ddof=1)) / math.sqrt(len(array))
    return _estimate(mean, error, scale, len(array) - 1)


def over_episodes(values: ArrayLike, strata: ArrayLike | None = None) -> Estimate:
    """The mean of values of test episodes, and how well these models were measured.

    The mean over strata and its stratified standard error; the degrees of freedom are those of Welch
    and Satterthwaite, so that one stratum gives the paired t test over its episodes, and two give
    Welch's.

    Args:
        values: ``(E,)``, such as the differences of two rules.
        strata: ``(E,)`` integers, the stratum of each value: its seed and objective. None: one.
    """
    array, label = _with_strata(values, strata, "over_episodes")
    scale = float(np.abs(array).max()) or 1.0
    mean = stratified_mean(array, label)
    found = _error(array / scale, label)
    return Estimate(mean) if found is None else _estimate(mean, found[0], scale, found[1])


def stratified_mean(values: ArrayLike, strata: ArrayLike | None = None) -> float:
    """The mean over strata of each one's mean: with several objectives, each counts the same."""
    array, label = _with_strata(values, strata, "stratified_mean")
    return float((np.bincount(label, array) / np.bincount(label)).mean())


def stratified_error(values: ArrayLike, strata: ArrayLike | None = None) -> float | None:
    """The standard error of `stratified_mean`: sqrt(sum_k var_k / n_k) / K for K strata.

    The spread *between* strata is no part of it: which objectives there are is not drawn at random. A
    stratum of one value takes the variance within the others; None where every stratum is of one.

    >>> stratified_error([0.25, 0.75, 0.5, 0.5], [0, 0, 1, 1])
    0.125
    """
    array, label = _with_strata(values, strata, "stratified_error")
    scale = float(np.abs(array).max()) or 1.0
    found = _error(array / scale, label)
    return None if found is None else found[0] * scale


def half_width(values: ArrayLike, strata: ArrayLike | None = None) -> float | None:
    """1.96 `stratified_error`: half of the 95% interval of a mean over many episodes."""
    error = stratified_error(values, strata)
    return None if error is None else 1.96 * error


def holm(
    p_values: Sequence[float | None], families: Sequence[Hashable] | None = None
) -> list[float | None]:
    """P-values adjusted so that within a family the chance of any false claim stays below the level.

    Of the m values of a family in ascending order, the i-th becomes the largest of (m - j + 1) p_j over
    j <= i, and at most 1 (Holm 1979).

    Args:
        p_values: None where there was no test; it stays None and does not count.
        families: the family of each, such as ``primary`` or not; None: all are of one.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    groups = [None] * len(p_values) if families is None else list(families)
    adjusted: list[float | None] = [None] * len(p_values)
    for family in dict.fromkeys(groups):
        tested = [
            (p, i)
            for i, (p, own) in enumerate(zip(p_values, groups, strict=True))
            if own == family and p is not None
        ]
        if any(not 0 <= p <= 1 for p, _ in tested):
            raise InputError(f"holm: p-values must be in [0, 1], got {list(p_values)}")
        largest = 0.0
        for rank, (p, i) in enumerate(sorted(tested)):
            largest = max(largest, min(1.0, (len(tested) - rank) * p))
            adjusted[i] = largest
    return adjusted


def ahead(difference: float, higher_is_better: bool = True) -> bool:
    """Whether a difference (rule minus baseline) is in the rule's favour."""
    return difference > 0 if higher_is_better else difference < 0


def verdict(difference: float, p_holm: float | None, higher_is_better: bool = True) -> str:
    """What may be claimed: ``ahead``, ``behind`` or ``no difference shown``.

    >>> verdict(-0.02, 0.01), verdict(-0.02, 0.01, higher_is_better=False), verdict(-0.02, 0.2)
    ('behind', 'ahead', 'no difference shown')
    """
    if math.isnan(difference) or (p_holm is not None and not 0 <= p_holm <= 1):
        raise InputError(
            f"verdict: expected a difference and a p-value, got {difference}, {p_holm}"
        )
    if p_holm is None or p_holm >= LEVEL or difference == 0:
        return "no difference shown"
    return "ahead" if ahead(difference, higher_is_better) else "behind"


def seeds_needed(
    differences: ArrayLike, smallest: float, tests: int = 1
) -> tuple[int, int | None] | None:
    """How many seeds it would take to show a true difference of ``smallest``, as a range.

    The least S >= 3 at which the paired t test at ``level`` = 0.05 / ``tests``, the first step of Holm,
    rejects in the right direction with a chance of 80%: t is then noncentral, with S - 1 degrees of
    freedom and noncentrality ``smallest`` sqrt(S) / sigma. The spread sigma is itself estimated from
    few seeds: the range comes from the two ends of its 80% interval (by chi-squared), within which it
    may well be.

    Args:
        differences: ``(S,)`` d_s, S >= 3.
        smallest: above 0, in the unit of the differences.
        tests: how many rules the family has.

    Returns:
        The least and the most, which is None beyond 10,000; None for fewer than 3 seeds, and for
        differences that are equal up to rounding, which say nothing about their spread.
    """
    from scipy import special

    array = _finite(differences, "seeds_needed: differences")
    if not (0 < smallest <= LARGEST and tests >= 1):
        raise InputError(
            f"seeds_needed: smallest must be above 0 and tests at least 1, got {smallest}, {tests}"
        )
    if len(array) < FEWEST:
        return None
    scale = max(float(np.abs(array).max()), smallest)
    free = len(array) - 1
    squares = float(((array / scale - (array / scale).mean()) ** 2).sum())
    if squares <= EQUAL**2 * free:
        return None
    least, most = (
        _fewest_seeds(smallest / scale, math.sqrt(squares / special.chdtri(free, tail)), tests)
        for tail in (0.1, 0.9)
    )
    return (MOST_SEEDS if least is None else least), most


def _fewest_seeds(smallest: float, sigma: float, tests: int) -> int | None:
    """By bisection: what a number of seeds can show only grows with it."""
    from scipy import special

    def do(seeds: int) -> bool:
        free, expected = seeds - 1, smallest * math.sqrt(seeds)
        critical = float(special.stdtrit(free, 1 - LEVEL / tests / 2))
        if expected > sigma * (5 * critical + 10):  # out of the distribution function's range
            return True
        return bool(special.nctdtr(free, expected / sigma, critical) <= 1 - POWER)

    if not do(MOST_SEEDS):
        return None
    low, high = FEWEST - 1, MOST_SEEDS  # `high` does, `low` is too few
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if do(middle) else (middle, high)
    return high


def _estimate(mean: float, error: float, scale: float, free: float) -> Estimate:
    """From a mean and its standard error, ``error`` times ``scale``."""
    from scipy import special

    if error <= EQUAL * abs(mean) / scale:  # equal up to rounding
        return Estimate(mean, 0.0, 1.0 if mean == 0 else None)
    half = float(special.stdtrit(free, 0.975)) * error * scale
    return Estimate(mean, half, float(2 * special.stdtr(free, -abs(mean / scale) / error)))


def _error(values: Array, strata: np.ndarray[Any, np.dtype[np.intp]]) -> tuple[float, float] | None:
    """Stratified standard error, and its degrees of freedom; None if no stratum has two values."""
    count = np.bincount(strata).astype(np.float64)
    free = count - 1
    if not free.any():
        return None
    means = np.bincount(strata, values) / count
    squares = np.bincount(strata, (values - means[strata]) ** 2)
    within = squares.sum() / free.sum()
    variance = np.divide(squares, free, out=np.full_like(squares, within), where=free > 0)
    parts = variance / count
    total = float(parts.sum())
    if total == 0:
        return 0.0, float(free.sum())
    # a stratum of one value has the pooled variance, and its degrees of freedom
    known = np.where(free > 0, free, free.sum())
    return math.sqrt(total) / len(count), float(1 / ((parts / total) ** 2 / known).sum())


def _finite(values: ArrayLike, what: str) -> Array:
    """A vector of float64 without NaN or infinity.

    Raises:
        InputError: empty, not a vector, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{what} must be a vector of at least one value, got shape {array.shape}")
    if bad := int((~(np.abs(array) <= LARGEST)).sum()):
        raise InputError(
            f"{what}: {bad} of {len(array)} are NaN, infinite or beyond {LARGEST:g}; report what "
            "diverged as a failure, or lower `inner_lr`"
        )
    return array


def _with_strata(
    values: ArrayLike, strata: ArrayLike | None, what: str
) -> tuple[Array, np.ndarray[Any, np.dtype[np.intp]]]:
    """The values, and their strata numbered from 0."""
    array = _finite(values, f"{what}: values")
    if strata is None:
        return array, np.zeros(len(array), dtype=np.intp)
    given = np.asarray(strata)
    if given.shape != array.shape:
        raise InputError(
            f"{what}: strata must be one for each of the {len(array)} values, got shape {given.shape}"
        )
    if (given == given[0]).all():  # the usual case, and the quick one
        return array, np.zeros(len(array), dtype=np.intp)
    return array, np.unique(given, return_inverse=True)[1].astype(np.intp)
