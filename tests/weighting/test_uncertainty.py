"""Uncertainty weighting against TorchJD's, autograd, and the optimum in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gametalearn import InputError, TaskGradients, UncertaintyWeighting
from tests.support import records

torchjd = pytest.importorskip("torchjd.scalarization")
F64 = torch.float64


def record(loss: Tensor) -> TaskGradients:
    """An objective for each task."""
    return records.record(loss=loss, group=list(range(len(loss))))


def losses(steps: int, objectives: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    falling = torch.linspace(2, 0.2, steps, dtype=F64).unsqueeze(1)
    return falling * torch.rand(steps, objectives, generator=generator, dtype=F64) * 3


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_equals_torchjd(optimizer: str) -> None:
    oracle = torchjd.UW(4).double()
    cls = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    steps = cls(oracle.parameters(), lr=0.05)
    rule = UncertaintyWeighting(4, lr=0.05, optimizer=optimizer)  # type: ignore[arg-type]
    for loss in losses(100):
        values = loss.clone().requires_grad_()
        steps.zero_grad()
        oracle(values).backward()
        weights = rule(record(loss))
        torch.testing.assert_close(weights.raw, values.grad)
        torch.testing.assert_close(weights.effective, weights.raw / 4)
        steps.step()
    torch.testing.assert_close(rule.log_var.data, oracle.log_var.data)
    assert rule.log_var.abs().max() > 0.1


def test_the_positive_form_follows_autograd() -> None:
    s = torch.zeros(4, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=0.05)
    rule = UncertaintyWeighting(4, form="positive", lr=0.05)
    for loss in losses(100):
        weights = rule(record(loss))
        torch.testing.assert_close(weights.raw, 1 / (2 * s.detach().exp()))
        optimizer.zero_grad()
        variance = s.exp()
        (loss / (2 * variance) + torch.log(1 + variance)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(rule.log_var.data, s.detach())


@pytest.mark.parametrize("form", ["kendall", "positive"])
def test_constant_losses_lead_to_the_optimum(form: str) -> None:
    """Kendall: sigma^2 = L. Positive: u = sigma^2 solves 2 u^2 = L (1 + u)."""
    loss = torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    rule = UncertaintyWeighting(3, form=form)  # type: ignore[arg-type]
    for _ in range(2000):
        rule(record(loss))
    root = (loss + (loss * loss + 8 * loss).sqrt()) / 4
    optimum = loss if form == "kendall" else root
    torch.testing.assert_close(rule.log_var.exp(), optimum, rtol=1e-3, atol=0)


def test_starts_at_a_half() -> None:
    for form in ("kendall", "positive"):
        weights = UncertaintyWeighting(2, form=form)(record(torch.tensor([1.0, 7.0])))
        assert weights.raw.tolist() == [0.5, 0.5]
        assert weights.effective.tolist() == [0.25, 0.25]


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(InputError, match="form must be 'kendall' or 'positive', got 'gal'"):
        UncertaintyWeighting(2, form="gal")  # type: ignore[arg-type]
