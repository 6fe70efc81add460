"""How a rule does on several objectives at once: relative change, mean rank, the Pareto front.

Accuracy averaged over objectives of different difficulty hides which of them paid. Multi-task learning
therefore looks at each objective's *relative* change against a model that learned it alone, and at ranks.
Pure functions of arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gametalearn.errors import InputError
from gametalearn.statistics import EQUAL

__all__ = ["mean_ranks", "non_dominated", "relative_change", "relative_change_of_means"]

Array = np.ndarray[Any, np.dtype[np.float64]]


def relative_change(
    values: ArrayLike, single: ArrayLike, higher_is_better: bool = True
) -> list[float] | None:
    """Delta_m of each seed: the mean over objectives of the relative change against single-objective models.

        Delta_m = 1/K sum_k (-1)^l (M_k - B_k) / B_k

    with M_k the rule's mean on objective k, B_k that of the model that learned k alone, and l = 1 where
    lower is better, else 0 (Maninis, Radosavovic, Kokkinos 2019, arXiv 1904.08918, equation 4;
    LibMTL's tables). A value above 0 is better than learning each objective alone.

    Args:
        values, single: ``(S, K)`` for S seeds and K objectives, M and B.
        higher_is_better: whether a higher score is better.

    Returns:
        S fractions (0.01 is one percent); None if some B_k is 0, since no change is relative to 0.

    >>> relative_change([[0.5, 0.375]], [[0.5, 0.5]])
    [-0.125]
    """
    mine, alone = _pair(values, single, "relative_change")
    if not alone.all():
        return None
    change = (mine - alone) / np.abs(alone)
    found: list[float] = (change if higher_is_better else -change).mean(1).tolist()
    return found


def relative_change_of_means(
    values: ArrayLike, single: ArrayLike, higher_is_better: bool = True
) -> list[float] | None:
    """Delta_m of the means over seeds, as S values with this mean and the spread that it has over seeds.

    Tables of the multi-task literature have Delta_m of means. The mean of `relative_change` over seeds is
    not quite that: a ratio whose denominator varies by a fraction v is larger by about v^2 in the mean. The
    S values are those of the delta method,

        1/K sum_k (-1)^l [ (M_k - B_k) + (m_sk - M_k) - (M_k / B_k) (b_sk - B_k) ] / |B_k|

    with m_sk and b_sk the means of seed s, and M_k and B_k theirs over seeds; their t interval is that of
    Delta_m.

    Args, returns:
        as `relative_change`; with one seed, the same.

    >>> values, single = [[0.6], [0.2]], [[0.3], [0.5]]
    >>> [round(v, 3) for v in relative_change(values, single)]
    [1.0, -0.6]
    >>> [round(v, 3) for v in relative_change_of_means(values, single)]  # 0.4 / 0.4 is no change
    [0.75, -0.75]
    """
    mine, alone = _pair(values, single, "relative_change_of_means")
    over, base = mine.mean(0), alone.mean(0)
    if not base.all():
        return None
    change = (mine - over / base * alone + over - base) / np.abs(base)
    found: list[float] = (change if higher_is_better else -change).mean(1).tolist()
    return found


def mean_ranks(means: ArrayLike, higher_is_better: bool = True) -> list[float]:
    """The rank of each rule, 1 for the best, averaged over objectives; ties share a rank.

    Means that differ by no more than rounding are ties.

    Args:
        means: ``(R, K)`` for R rules and K objectives.
        higher_is_better: whether a higher score is better.

    >>> mean_ranks([[0.9, 0.3], [0.8, 0.4], [0.8, 0.2]])
    [1.5, 1.75, 2.75]
    """
    array = _matrix(means, "means")
    ordered = -array if higher_is_better else array
    tied = _tied(ordered)
    before = ((ordered[None] < ordered[:, None]) & ~tied).sum(1)
    equal = tied.sum(1)
    found: list[float] = (before + (equal + 1) / 2).mean(1).tolist()
    return found


def non_dominated(points: ArrayLike, higher_is_better: bool = True) -> list[bool]:
    """Which points are on the Pareto front: no other is as good on all objectives and better on one.

    Values that differ by no more than rounding are equal.

    Args:
        points: ``(R, K)`` for R rules and K objectives.
        higher_is_better: whether a higher score is better.

    >>> non_dominated([[0.9, 0.3], [0.8, 0.4], [0.8, 0.2]])
    [True, True, False]
    """
    array = _matrix(points, "points")
    ordered = array if higher_is_better else -array
    tied = _tied(ordered)
    as_good = np.all((ordered[None] > ordered[:, None]) | tied, axis=2)
    better = np.any((ordered[None] > ordered[:, None]) & ~tied, axis=2)
    return [not dominated for dominated in np.any(as_good & better, axis=1)]


def _tied(array: Array) -> Any:
    """``(R, R, K)``: which two rows are equal in a column, up to rounding."""
    return np.isclose(array[None], array[:, None], rtol=EQUAL, atol=0)


def _pair(values: ArrayLike, single: ArrayLike, name: str) -> tuple[Array, Array]:
    mine, alone = _matrix(values, "values"), _matrix(single, "single")
    if mine.shape != alone.shape:
        raise InputError(
            f"{name}: values {mine.shape} and single {alone.shape} must have equal shapes"
        )
    return mine, alone


def _matrix(values: ArrayLike, what: str) -> Array:
    """Raises `InputError` for anything but a matrix of finite numbers with rows and columns."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise InputError(f"{what}: expected a matrix of finite numbers, got shape {array.shape}")
    return array
