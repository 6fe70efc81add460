"""Diagnostics against numpy's own norms and cosines, and at the edges."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gametalearn import Diagnostics, InputError, Weights, diagnose, make_rule
from gametalearn.diagnostics import cosine_matrix, effective_tasks, negative_share
from tests.support.records import record


def weighted(effective: Tensor) -> Weights:
    return Weights(raw=effective, effective=effective)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


GROUPS = [7, 3, 7, 3, 7, 9]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_equals_numpy(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator)
    weights = torch.tensor([0.3, -0.1, 0.2, 0.1, -0.2, 0.1])
    found = diagnose(record(rows * scale, group=GROUPS), weighted(weights))
    g, e = rows.double().numpy(), weights.double().numpy()
    update, mean = e @ g, g.mean(0)
    expected = np.array([[cosine(a, b) for b in g] for a in g])
    np.testing.assert_allclose(found.cosine.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.norms.numpy(), np.linalg.norm(g, axis=1) * scale, rtol=1e-5)
    off = expected[~np.eye(6, dtype=bool)]
    assert found.mean_cosine == pytest.approx(off.mean(), rel=1e-5)
    assert found.update_norm == pytest.approx(np.linalg.norm(update) * scale, rel=1e-5)
    assert found.mean_norm == pytest.approx(np.linalg.norm(mean) * scale, rel=1e-5)
    assert found.update_cosine == pytest.approx(cosine(update, mean), rel=1e-5)
    assert found.effective_tasks == pytest.approx(np.abs(e).sum() ** 2 / (e**2).sum())
    assert found.negative_share == pytest.approx(2 / 6)

    assert list(found.objectives) == [3, 7, 9]
    for group, own in found.objectives.items():
        tasks = np.array(GROUPS) == group
        assert own.tasks == tasks.sum()
        assert own.weight == pytest.approx(e[tasks].sum(), abs=1e-7)
        part = np.linalg.norm(e[tasks] @ g[tasks])
        assert own.update_norm == pytest.approx(part * scale, rel=1e-5)
        assert own.update_cosine == pytest.approx(cosine(g[tasks].mean(0), update), rel=1e-4)
        assert own.negative_share == pytest.approx((e[tasks] < 0).mean())
    assert found.objectives[9].mean_cosine is None
    assert found.objectives[3].mean_cosine == pytest.approx(expected[1, 3], rel=1e-5)
    means = [g[np.array(GROUPS) == group].mean(0) for group in (3, 7, 9)]
    between = [[cosine(a, b) for b in means] for a in means]
    np.testing.assert_allclose(found.objective_cosine.numpy(), between, rtol=1e-5, atol=1e-6)


def test_values_to_check_by_hand() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-3.0, 0.0]])
    found = diagnose(record(rows), weighted(torch.tensor([0.5, 0.25, -0.25])))
    assert found.cosine.tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    assert found.mean_cosine == pytest.approx(-1 / 3)
    # The update is (2.25, 1), the mean (0, 4/3).
    assert found.update_norm == pytest.approx(np.hypot(2.25, 1))
    assert found.mean_norm == pytest.approx(4 / 3)
    assert found.update_cosine == pytest.approx(1 / np.hypot(2.25, 1))
    assert found.effective_tasks == pytest.approx(1 / 0.375)
    assert found.negative_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("rule", ["uniform", "agreement", "gradnorm", "dtp"])
@pytest.mark.parametrize("kind", ["random", "one task", "zero", "opposing", "one zero row"])
def test_records_are_json_without_nan(rule: str, kind: str) -> None:
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    if kind == "one task":
        rows = rows[:1]
    elif kind == "zero":
        rows = torch.zeros(5, 30)
    elif kind == "opposing":
        rows = torch.cat([rows, -rows])
    elif kind == "one zero row":
        rows[2] = 0
    gradients = record(rows, group=[i % 2 for i in range(len(rows))])
    found = diagnose(gradients, make_rule(rule, objectives=2)(gradients))
    line = json.dumps(found.as_record(), allow_nan=False)
    again = json.loads(line)
    assert again["cosine"] == [[round(c, 4) for c in row] for row in found.cosine.tolist()]
    assert set(again["objectives"]) == {str(g) for g in found.objectives}
    assert "cosine" not in found.as_record(matrices=False)
    if kind == "opposing":
        # The mean vanishes up to rounding: it has no direction.
        assert found.update_cosine == 0


def test_zero_rows_have_no_direction() -> None:
    rows = torch.eye(3)
    rows[1] = 0
    assert cosine_matrix(rows).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_effective_tasks(scale: float) -> None:
    for weights, expected in (
        ([1.0, 0.0, 0.0], 1),
        ([0.25, 0.25, 0.25, 0.25], 4),
        ([0.5, -0.5], 2),
        ([0.0, 0.0], 0),
    ):
        assert effective_tasks(torch.tensor(weights).double() * scale) == pytest.approx(expected)
    assert negative_share(torch.tensor([-1.0, 0.0, 1.0, -2.0])) == 0.5


def test_norm_control_turns_nothing_and_agreement_does() -> None:
    gradients = record(torch.randn(6, 200, generator=torch.Generator().manual_seed(2)))
    found = {
        name: diagnose(gradients, make_rule(name)(gradients))
        for name in ("uniform", "agreement", "norm-control")
    }
    assert found["uniform"].update_norm == pytest.approx(found["uniform"].mean_norm)
    assert found["norm-control"].update_norm == pytest.approx(found["agreement"].update_norm)
    assert found["norm-control"].update_cosine == pytest.approx(1)
    assert found["agreement"].update_cosine < 0.99


def test_bad_input_is_refused() -> None:
    gradients = record(torch.ones(3, 2))
    with pytest.raises(InputError, match=r"expected 3 effective weights.*got \(2,\)"):
        diagnose(gradients, weighted(torch.ones(2)))
    with pytest.raises(InputError, match="effective weight of task 1 is not finite"):
        diagnose(gradients, weighted(torch.tensor([1.0, float("nan"), 0.0])))
    rows = torch.ones(3, 2)
    rows[2, 0] = float("inf")
    with pytest.raises(InputError, match="gradient of task 2 is not finite"):
        diagnose(replace(gradients, rows=rows), weighted(torch.ones(3)))


def test_the_record_is_frozen() -> None:
    found = diagnose(record(torch.ones(2, 2)), weighted(torch.ones(2)))
    assert isinstance(found, Diagnostics)
    with pytest.raises(AttributeError):
        found.update_norm = 0.0  # type: ignore[misc]
