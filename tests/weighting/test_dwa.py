"""Dynamic weight average against TorchJD's, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gametalearn import DynamicWeightAverage, InputError, TaskGradients
from tests.support import records

torchjd = pytest.importorskip("torchjd.scalarization")
F64 = torch.float64


def record(loss: Tensor, group: list[int] | None = None) -> TaskGradients:
    """An objective for each task, unless ``group`` says more."""
    own = range(len(loss)) if group is None else group
    return records.record(loss=loss, group=list(own))


@pytest.mark.parametrize("period", [1, 5])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_equals_torchjd(period: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(5)
    oracle = torchjd.DWA(temperature)
    rule = DynamicWeightAverage(3, temperature=temperature, period=period)
    for step in range(12 * period):
        loss = torch.rand(3, generator=generator, dtype=F64) + 0.05
        values = loss.clone().requires_grad_()
        oracle(values).backward()
        weights = rule(record(loss))
        torch.testing.assert_close(weights.raw, values.grad)
        torch.testing.assert_close(weights.effective, weights.raw / 3)
        if step % period == period - 1:
            oracle.step()
    assert float(weights.raw.max() - weights.raw.min()) > 0.01


def test_values_to_check_by_hand() -> None:
    rule = DynamicWeightAverage(2, temperature=1.0, period=1)
    assert rule(record(torch.tensor([4.0, 4.0], dtype=F64))).raw.tolist() == [1, 1]
    assert rule(record(torch.tensor([2.0, 4.0], dtype=F64))).raw.tolist() == [1, 1]
    # Ratios 1/2 and 1: e^0.5 and e^1 over their mean.
    raw = rule(record(torch.tensor([9.0, 9.0], dtype=F64))).raw
    half, one = math.exp(0.5), math.exp(1.0)
    assert raw.tolist() == pytest.approx([2 * half / (half + one), 2 * one / (half + one)])


def test_an_epoch_averages_the_iterations_where_an_objective_was_present() -> None:
    rule = DynamicWeightAverage(2, temperature=1.0, period=2)
    both = [0, 1]
    for loss, group in (
        ([4.0, 3.0], both),
        ([6.0], [0]),  # epoch 1: 5 and 3
        ([2.0], [0]),
        ([3.0, 3.0], both),  # epoch 2: 2.5 and 3
    ):
        assert rule(record(torch.tensor(loss, dtype=F64), group)).raw.tolist() == [1, 1]
    half, one = math.exp(0.5), math.exp(1.0)
    raw = rule(record(torch.tensor([1.0, 1.0], dtype=F64))).raw
    assert raw.tolist() == pytest.approx([2 * half / (half + one), 2 * one / (half + one)])


def test_losses_that_vanish_leave_finite_weights() -> None:
    rule = DynamicWeightAverage(2, period=1)
    for loss in ([0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1e-30, 1.0], [1e30, 1.0]):
        raw = rule(record(torch.tensor(loss, dtype=F64))).raw
        assert torch.isfinite(raw).all()
        assert float(raw.sum()) == pytest.approx(2)


def test_options_and_losses_are_checked() -> None:
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        DynamicWeightAverage(2, temperature=0.0)
    with pytest.raises(InputError, match="period must be at least 1, got 0"):
        DynamicWeightAverage(2, period=0)
    with pytest.raises(InputError, match=r"loss of task 0 \(objective 0\) is negative"):
        DynamicWeightAverage(2)(record(torch.tensor([-1.0, 1.0])))
