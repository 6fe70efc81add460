"""Rules by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from gametalearn import (
    RULES,
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    GradientAgreement,
    GradNorm,
    InputError,
    NormControl,
    UncertaintyWeighting,
    Uniform,
    make_rule,
)
from gametalearn.weighting import rule_options


@pytest.mark.parametrize("name", RULES)
def test_every_name_makes_a_module(name: str) -> None:
    assert isinstance(make_rule(name, objectives=3), nn.Module)


def test_names_stand_for_options() -> None:
    assert isinstance(make_rule("uniform"), Uniform)
    assert isinstance(make_rule("norm-control"), NormControl)
    for name, signal, normalize in (
        ("agreement", "meta_gradient", False),
        ("agreement-update", "update", False),
        ("agreement-cosine", "meta_gradient", True),
    ):
        rule = make_rule(name)
        assert isinstance(rule, GradientAgreement)
        assert (rule.signal, rule.normalize) == (signal, normalize)


def test_rules_over_objectives_get_their_settings() -> None:
    columns = slice(3, 7)
    rule = make_rule("gradnorm", objectives=[4, 9], columns=columns, within="agreement", alpha=0.5)
    assert isinstance(rule, GradNorm)
    assert (rule.span, rule.alpha) == (columns, 0.5)
    assert rule.objectives.identities.tolist() == [4, 9]
    assert rule.objectives.within == "agreement"
    for name, form in (("uncertainty", "kendall"), ("uncertainty-positive", "positive")):
        rule = make_rule(name, objectives=2, columns=columns, lr=0.1)
        assert isinstance(rule, UncertaintyWeighting)
        assert (rule.form, rule.descent.lr) == (form, 0.1)
    rule = make_rule("dwa", objectives=2, period=7, regression=True)
    assert isinstance(rule, DynamicWeightAverage)
    assert rule.period == 7
    assert isinstance(make_rule("dtp", gamma=2), DynamicTaskPrioritization)


@pytest.mark.parametrize("objectives", [0, -1, [], [1, 1]])
def test_objectives_are_checked(objectives: int | list[int]) -> None:
    with pytest.raises(InputError, match="objectives: expected a positive number or distinct"):
        make_rule("dwa", objectives=objectives)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("agrement", "unknown rule 'agrement'; did you mean 'agreement'\\? known: uniform, agree"),
        ("normcontrol", "did you mean 'norm-control'"),
        ("xyz", "unknown rule 'xyz'; known: .*torchjd:NAME"),
        ("", "unknown rule ''; known"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_rule(name)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InputError, match="rule 'uniform': no option 'alpha'; it takes none"):
        make_rule("uniform", alpha=1)
    with pytest.raises(InputError, match="rule 'agreement-update': no option 'signal'; it takes n"):
        make_rule("agreement-update", signal="meta_gradient")
    with pytest.raises(InputError, match="rule 'dwa': no option 'alpha'; it takes period, t"):
        make_rule("dwa", alpha=1)
    with pytest.raises(InputError, match="no option 'form'"):
        make_rule("uncertainty-positive", form="kendall")


@pytest.mark.parametrize("name", RULES)
def test_the_options_of_a_rule_are_its_keyword_arguments(name: str) -> None:
    assert make_rule(name, objectives=2, **rule_options(name))


def test_the_options_of_every_rule() -> None:
    assert {name: list(rule_options(name)) for name in RULES} == {
        "uniform": [],
        "agreement": ["signal", "normalize"],
        "agreement-update": ["normalize"],
        "agreement-cosine": ["signal"],
        "norm-control": [],
        "normalized-mean": [],
        "geometric-median": [],
        "screened-mean": ["window", "apart", "sigma"],
        "gradnorm": ["alpha", "lr", "floor", "optimizer"],
        "uncertainty": ["form", "lr", "optimizer"],
        "uncertainty-positive": ["lr", "optimizer"],
        "dwa": ["temperature", "period"],
        "dtp": ["gamma", "decay", "indicator"],
    }


@pytest.mark.parametrize(
    ("name", "option", "value", "wanted"),
    [
        ("dwa", "period", 2.5, "an integer, got 2.5"),
        ("dwa", "period", True, "an integer, got True"),
        ("dwa", "temperature", "hot", "a number, got 'hot'"),
        ("gradnorm", "alpha", float("inf"), "a number, got inf"),
        ("gradnorm", "alpha", [1.0], r"a number, got \[1.0\]"),
        ("uncertainty", "optimizer", "lion", "'adam' or 'sgd', got 'lion'"),
        ("agreement", "normalize", 1, "true or false, got 1"),
        ("dtp", "gamma", "[1", "a number or a list, each a number, got '\\[1'"),
        ("dtp", "gamma", [1.0, "x"], "a number or a list, each a number, got"),
    ],
)
def test_values_of_another_type_are_refused(
    name: str, option: str, value: Any, wanted: str
) -> None:
    with pytest.raises(InputError, match=f"rule '{name}': {option} must be {wanted}"):
        make_rule(name, objectives=2, **{option: value})
