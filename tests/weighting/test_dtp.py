"""Dynamic task prioritization: the formula, its clamp, and the refusal of regression."""

from __future__ import annotations

import math

import pytest
import torch

from gametalearn import DynamicTaskPrioritization, InputError, TaskGradients, make_rule
from gametalearn.weighting.dtp import focal_weight
from tests.support import records


def record(score: list[float], group: list[int] | None = None) -> TaskGradients:
    """An objective for each task, unless ``group`` says more."""
    own = range(len(score)) if group is None else group
    return records.record(score=torch.tensor(score).double(), group=list(own))


def test_equals_the_formula_over_a_moving_average() -> None:
    rule = DynamicTaskPrioritization(2, gamma=[0.5, 2.0], decay=0.8)
    generator = torch.Generator().manual_seed(0)
    kappa: list[float] = []
    for _ in range(30):
        score = torch.rand(4, generator=generator, dtype=torch.float64)
        means = [float(score[0] + score[2]) / 2, float(score[1] + score[3]) / 2]
        pairs = zip(kappa or means, means, strict=True)
        kappa = [0.8 * old + 0.2 * new for old, new in pairs]
        expected = [-((1 - k) ** g) * math.log(k) for k, g in zip(kappa, (0.5, 2.0), strict=True)]
        weights = rule(record(score.tolist(), [0, 1, 0, 1]))
        assert weights.raw.tolist() == pytest.approx(expected)
        halves = [w / 4 for w in expected]  # 1/K for two objectives, 1/2 for two tasks
        assert weights.effective.tolist() == pytest.approx(halves * 2)


def test_the_likelihood_is_an_indicator_too() -> None:
    """exp(-L), a mean over the objective's tasks, averaged as accuracies are."""
    rule = DynamicTaskPrioritization(2, indicator="likelihood", decay=0.5)
    loss = torch.tensor([0.2, 0.4, 1.5, 1.5], dtype=torch.float64)
    batch = records.record(loss=loss, score=[7.0] * 4, group=[0, 0, 1, 1])
    kappa = torch.exp(-torch.tensor([0.3, 1.5], dtype=torch.float64))
    wanted = -(1 - kappa) * torch.log(kappa)
    torch.testing.assert_close(rule(batch).raw, wanted)
    torch.testing.assert_close(rule.facts["kappa"], kappa)
    rule(records.record(loss=[0.0], group=[0]))
    torch.testing.assert_close(rule.kappa, torch.stack([(kappa[0] + 1) / 2, kappa[1]]))
    assert rule.facts["kappa"].isnan().tolist() == [False, True]
    with pytest.raises(InputError, match=r"loss of task 0 \(objective 0\) is negative"):
        rule(records.record(loss=[-1.0], group=[0]))


def test_how_steep_the_weights_are() -> None:
    """The figures that the class's documentation gives."""
    at_chance, learned = (torch.tensor(k, dtype=torch.float64) for k in (0.2, 0.95))
    weights = [
        [float(focal_weight(kappa, torch.tensor(gamma))) for kappa in (at_chance, learned)]
        for gamma in (1.0, 0.0)
    ]
    assert weights[0] == pytest.approx([1.29, 0.0026], rel=0.02)
    assert weights[1] == pytest.approx([1.61, 0.051], rel=0.01)
    assert [a / b for a, b in weights] == pytest.approx([500, 31], rel=0.02)
    assert math.exp(-0.3) == pytest.approx(0.74, abs=0.005)


def test_the_first_value_starts_the_average() -> None:
    raw = DynamicTaskPrioritization(2)(record([0.5, 0.25])).raw
    assert raw.tolist() == pytest.approx([0.5 * math.log(2), 0.75 * math.log(4)])


def test_the_weight_neither_diverges_nor_vanishes() -> None:
    rule = DynamicTaskPrioritization(2)
    raw = rule(record([0.0, 1.0])).raw
    assert raw.tolist() == pytest.approx([-0.99 * math.log(0.01), -0.01 * math.log(0.99)])


def test_an_objective_never_seen_has_weight_one() -> None:
    assert DynamicTaskPrioritization(3)(record([0.5], [1])).raw[[0, 2]].tolist() == [1.0, 1.0]


def test_regression_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"rule 'dtp' .* regression has none; use gradnorm"):
        make_rule("dtp", objectives=2, regression=True)
    for score in (1.5, -0.1, math.nan):
        with pytest.raises(InputError, match=r"dtp needs accuracies in \[0, 1\].* task 1 is"):
            DynamicTaskPrioritization(2)(record([0.5, score]))


@pytest.mark.parametrize(
    "options", [{"gamma": -1.0}, {"gamma": [1.0]}, {"decay": 1.0}, {"indicator": "loss"}]
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(
        InputError, match=r"DynamicTaskPrioritization: (gamma|decay|indicator) must be"
    ):
        DynamicTaskPrioritization(2, **options)  # type: ignore[arg-type]


def test_a_state_of_other_objectives_is_refused() -> None:
    """gamma is not in the state: it would be another objective's."""
    rule = DynamicTaskPrioritization([3, 8], gamma=[0.0, 2.0])
    rule(record([0.3, 0.6], [3, 8]))
    same = DynamicTaskPrioritization([3, 8], gamma=[0.0, 2.0])
    same.load_state_dict(rule.state_dict())
    assert same.kappa.tolist() == rule.kappa.tolist()
    for other in (
        DynamicTaskPrioritization([8, 3], gamma=[2.0, 0.0]),
        DynamicTaskPrioritization(3),
    ):
        with pytest.raises(
            InputError, match=r"over the objectives \[3, 8\], .* objectives=\[3, 8\]"
        ):
            other.load_state_dict(rule.state_dict())
    assert not other.seen.any()
