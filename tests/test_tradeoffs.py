"""Relative change, ranks and the front: by hand, and against other implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from gametalearn import InputError
from gametalearn.statistics import over_seeds
from gametalearn.tradeoffs import (
    mean_ranks,
    non_dominated,
    relative_change,
    relative_change_of_means,
)


def test_relative_change_by_hand() -> None:
    # 10% below on one objective and 50% above on the other; and the reverse where lower is better
    found = relative_change([[0.9, 0.3], [0.5, 0.2]], [[1.0, 0.2], [0.5, 0.2]])
    assert found == pytest.approx([0.2, 0.0])
    assert relative_change([[0.9, 0.3]], [[1.0, 0.2]], False) == pytest.approx([-0.2])
    # of a score below 0 more is still better
    assert relative_change([[-1.0]], [[-2.0]]) == pytest.approx([0.5])
    assert relative_change([[0.9, 0.3]], [[1.0, 0.0]]) is None


def test_it_is_the_measure_of_libmtl() -> None:
    """A loop over tasks, as multi-task papers print it, in percent."""
    generator = np.random.default_rng(0)
    rule, single = generator.random((4, 3)), 0.5 + generator.random((4, 3))
    for higher in (True, False):
        wanted = []
        for seed in range(4):
            total = 0.0
            for k in range(3):
                sign = 1 if higher else -1
                total += sign * 100 * (rule[seed, k] - single[seed, k]) / single[seed, k]
            wanted.append(total / 3 / 100)
        assert relative_change(rule, single, higher) == pytest.approx(wanted)


@pytest.mark.parametrize("higher", [True, False])
def test_that_of_means_is_what_the_means_in_a_table_give(higher: bool) -> None:
    generator = np.random.default_rng(4)
    rule, single = 0.6 + 0.2 * generator.random((5, 3)), 0.4 + 0.3 * generator.random((5, 3))
    found = relative_change_of_means(rule, single, higher)
    assert found is not None
    of_means = (relative_change([rule.mean(0)], [single.mean(0)], higher) or [0.0])[0]
    assert np.mean(found) == pytest.approx(of_means)
    per_seed = relative_change(rule, single, higher)
    assert per_seed is not None
    assert abs(float(np.mean(per_seed)) - of_means) > 0.005  # the mean of ratios is another number
    assert relative_change_of_means(rule[:1], single[:1]) == relative_change(rule[:1], single[:1])
    assert relative_change_of_means([[1.0], [1.0]], [[1.0], [-1.0]]) is None
    with pytest.raises(InputError, match=r"relative_change_of_means: values \(1, 2\)"):
        relative_change_of_means([[1.0, 2.0]], [[1.0]])


def test_the_interval_of_that_of_means_covers() -> None:
    """With noise on both sides, 95% intervals hold the change of the true means about as often."""
    generator = np.random.default_rng(5)
    truth, base = np.array([0.9, 0.35]), np.array([0.95, 0.4])
    wanted = float(((truth - base) / base).mean())
    held = []
    for _ in range(2000):
        rule = truth + 0.02 * generator.standard_normal((5, 2))
        single = base + 0.02 * generator.standard_normal((5, 2))
        low, high = over_seeds(relative_change_of_means(rule, single) or []).ci95 or (0.0, 0.0)
        held.append(low <= wanted <= high)
    assert 0.93 < np.mean(held) < 0.97


def test_what_differs_by_rounding_is_equal() -> None:
    """The means of the same three numbers in another order."""
    first, second = (float(np.mean(v)) for v in ([0.2, 0.3, 0.4], [0.4, 0.2, 0.3]))
    assert first != second
    assert mean_ranks([[first], [second]]) == [1.5, 1.5]
    assert mean_ranks([[first], [second]], False) == [1.5, 1.5]
    assert non_dominated([[first, 0.5], [second, 0.5]]) == [True, True]
    assert non_dominated([[first, 0.5], [second, 0.4]]) == [True, False]


def test_ranks_are_those_of_scipy() -> None:
    generator = np.random.default_rng(1)
    means = generator.integers(0, 4, (6, 5)) / 4  # with ties
    for higher in (True, False):
        sign = -1 if higher else 1
        wanted = stats.rankdata(sign * means, axis=0).mean(1)
        assert mean_ranks(means, higher) == pytest.approx(wanted.tolist())


def dominated(points: Any, number: int) -> bool:
    return any(
        all(a >= b for a, b in zip(other, points[number], strict=True)) and other != points[number]
        for other in points
    )


def test_the_front() -> None:
    generator = np.random.default_rng(2)
    points = [tuple(map(float, p)) for p in generator.integers(0, 5, (12, 3))]
    points.append(points[0])  # equal points do not dominate each other
    assert non_dominated(points) == [not dominated(points, i) for i in range(len(points))]
    turned = [tuple(-v for v in p) for p in points]
    assert non_dominated(turned, False) == non_dominated(points)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(InputError, match=r"values \(1, 2\) and single \(1, 1\)"):
        relative_change([[1.0, 2.0]], [[1.0]])
    with pytest.raises(InputError, match="means: expected a matrix"):
        mean_ranks([1.0, 2.0])
    with pytest.raises(InputError, match="points: expected a matrix of finite numbers"):
        non_dominated([[float("nan")]])
