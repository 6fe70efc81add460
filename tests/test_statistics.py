"""`gametalearn.statistics` beside scipy, by hand, and at its edges."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gametalearn.errors import InputError
from gametalearn.statistics import (
    Estimate,
    holm,
    over_episodes,
    over_seeds,
    seeds_needed,
    stratified_error,
    stratified_mean,
    verdict,
)

SEEDS = st.integers(0, 2**32 - 1)


def same(found: Estimate, peer: Any, scale: float = 1.0) -> None:
    """Is an estimate what scipy's test says, to 1e-12? Its values are ``scale`` times scipy's."""
    interval = tuple(scale * v for v in peer.confidence_interval(0.95))
    assert found.ci95 == pytest.approx(interval, rel=1e-12, abs=1e-12 * scale)
    assert found.p_value == pytest.approx(peer.pvalue, rel=1e-12, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(3, 30), st.floats(-2, 2), st.sampled_from([1e-3, 1, 1e3]))
def test_over_seeds_is_scipys_paired_test(seed: int, n: int, shift: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(shift, 1, n), generator.normal(0, 1, n)
    found = over_seeds(scale * (a - b))
    assert found.mean == pytest.approx(scale * (a - b).mean(), rel=1e-12, abs=1e-12 * scale)
    same(found, stats.ttest_rel(a, b), scale)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(2, 60), st.integers(2, 60), st.floats(-1, 1))
def test_over_episodes_is_the_paired_test_and_welchs(
    seed: int, n: int, m: int, shift: float
) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(shift, 1, n), generator.normal(0, 3, m)
    same(over_episodes(a), stats.ttest_1samp(a, 0))
    # the mean of two strata is half the difference of one and the other's negative
    order = generator.permutation(n + m)
    found = over_episodes(np.concatenate([a, b])[order], np.repeat([7, -1], [n, m])[order])
    same(found, stats.ttest_ind(a, -b, equal_var=False), 0.5)


def test_a_stratified_error_by_hand() -> None:
    # variances 0.5 of two and 1/3 of four values: sqrt(0.5 / 2 + 1 / 12) / 2
    values, strata = [0, 1, 10, 11, 10, 11], [3, 3, 8, 8, 8, 8]
    assert stratified_error(values, strata) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert stratified_mean(values, strata) == pytest.approx((0.5 + 10.5) / 2)
    # a single value takes the pooled variance within the others, (0.5 + 1) / (1 + 3)
    one = stratified_error([*values, 5], [*strata, 0])
    assert one == pytest.approx(math.sqrt(1 / 3 + 3 / 8) / 3)
    assert stratified_error([1, 2], [0, 1]) is None


def test_the_spread_between_objectives_is_no_error() -> None:
    generator = np.random.default_rng(0)
    values, group = generator.normal(0, 0.1, 600), np.repeat([0, 1], 300)
    apart = values + np.where(group == 0, 0.8, 0.25)
    assert stratified_error(apart, group) == pytest.approx(stratified_error(values, group))
    one, other = (stratified_error(values[group == k]) for k in (0, 1))
    assert one is not None
    assert other is not None
    assert stratified_error(values, group) == pytest.approx(math.hypot(one, other) / 2)


def test_few_and_equal_values() -> None:
    assert over_seeds([0.5]) == Estimate(0.5)
    assert over_seeds([0.25, 0.75]) == Estimate(0.5)
    assert over_seeds([0.0, 0.0, 0.0]) == Estimate(0.0, 0.0, 1.0)
    equal = over_seeds([0.6 - 0.5, 0.4 - 0.3, 0.1])  # up to rounding
    assert equal.mean == pytest.approx(0.1)
    assert (equal.half, equal.p_value) == (0.0, None)
    assert over_episodes([0.5]) == Estimate(0.5)
    assert over_episodes([0.5, 1.5], [0, 1]) == Estimate(1.0)
    assert over_episodes([0.5, 0.5]) == Estimate(0.5, 0.0, None)
    assert over_episodes([0.0, 0.0]).p_value == 1.0


def test_what_is_not_finite_is_refused() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for function in (over_seeds, over_episodes, stratified_mean, stratified_error):
            with pytest.raises(InputError, match="1 of 4 are NaN"):
                function([0.1, 0.2, bad, 0.3])
        with pytest.raises(InputError, match="1 of 3 are NaN"):
            seeds_needed([0.1, 0.2, bad], 0.005)
        with pytest.raises(InputError, match="p-values"):
            holm([0.5, bad])
    for empty in ([], [[0.5]]):
        with pytest.raises(InputError, match="a vector of at least one value"):
            over_seeds(empty)
    with pytest.raises(InputError, match="one for each of the 2 values"):
        over_episodes([1.0, 2.0], [0])
    for smallest, tests in ((0.0, 1), (math.nan, 1), (0.1, 0)):
        with pytest.raises(InputError, match="seeds_needed: smallest"):
            seeds_needed([0.1, 0.2, 0.3], smallest, tests)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e300, 1e300) | st.floats(-1, 1), st.integers(0, 3)), min_size=1)
)
def test_nothing_is_ever_nan(pairs: list[tuple[float, int]]) -> None:
    values, strata = zip(*pairs, strict=True)
    for found in (over_seeds(values), over_episodes(values, strata)):
        assert math.isfinite(found.mean)
        assert found.half is None or 0 <= found.half < math.inf
        assert found.p_value is None or 0 <= found.p_value <= 1
    error = stratified_error(values, strata)
    assert error is None or 0 <= error < math.inf
    needed = seeds_needed(values, 0.005, 3)
    if len(values) < 3 or len(set(values)) == 1:
        assert needed is None
    if needed is not None:
        assert 3 <= needed[0] <= (needed[1] or 10_000) <= 10_000


@given(st.lists(st.none() | st.floats(0, 1), max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p_values: list[float | None]) -> None:
    known = [i for i, p in enumerate(p_values) if p is not None]
    wanted: list[float | None] = [None] * len(p_values)
    for i in known:
        families = [
            family
            for size in range(1, len(known) + 1)
            for family in itertools.combinations(known, size)
            if i in family
        ]
        wanted[i] = max(min(1.0, len(f) * min(p_values[j] or 0.0 for j in f)) for f in families)
    assert holm(p_values) == wanted


def test_a_family_of_its_own_is_adjusted_by_itself() -> None:
    assert holm([0.04, 0.02, 0.03], ["primary", "rest", "rest"]) == [0.04, 0.04, 0.04]
    assert holm([]) == []


@pytest.mark.parametrize("given", [(0.1, math.nan), (math.nan, 0.01), (0.1, 1.2)])
def test_there_is_no_verdict_on_what_is_no_number(given: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="verdict: expected a difference and a p-value"):
        verdict(*given)


def test_verdicts_follow_the_direction_and_the_adjusted_p() -> None:
    assert verdict(0.02, 0.049) == "ahead"
    assert verdict(0.02, 0.049, higher_is_better=False) == "behind"
    assert verdict(-0.02, 0.049) == "behind"
    assert verdict(-0.02, 0.05) == "no difference shown"
    assert verdict(-0.02, None) == "no difference shown"


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 3), st.integers(1, 15))
def test_the_seeds_that_would_do_have_the_power(sigma: float, tests: int) -> None:
    """Beside scipy.stats."""
    differences = sigma * np.array([-1.0, 0.0, 1.0])  # standard deviation sigma
    found = seeds_needed(differences, 1.0, tests)
    assert found is not None
    for seeds, tail in zip(found, (0.9, 0.1), strict=True):
        assert seeds is not None
        true = sigma * math.sqrt(2 / stats.chi2.ppf(tail, 2))

        def power(n: int, true: float = true) -> float:
            critical = stats.t.ppf(1 - 0.05 / tests / 2, n - 1)
            return float(stats.nct.sf(critical, n - 1, math.sqrt(n) / true))

        assert power(seeds) > 0.8 - 1e-6
        assert seeds == 3 or power(seeds - 1) < 0.8 + 1e-6


def test_more_spread_needs_more_seeds_and_at_some_point_too_many() -> None:
    assert seeds_needed([0.01, 0.01, 0.01], 0.005) is None  # of equal ones the spread is not known
    narrow, wide = (seeds_needed([-s, 0.0, s], 0.005) for s in (0.002, 0.02))
    assert narrow is not None
    assert wide is not None
    assert narrow[0] < wide[0]
    assert wide[1] is not None
    assert seeds_needed([-1.0, 0.0, 1.0], 0.005) == (10_000, None)
    assert seeds_needed([0.1, 0.2], 0.005) is None
