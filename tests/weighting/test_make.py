"""Rules by name."""

from __future__ import annotations

import pytest
from torch import nn

from gametalearn import RULES, GradientAgreement, InputError, NormControl, Uniform, make_rule


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
