"""Absolute values, of which PyTorch's own second derivative cannot be traced, are replayed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn import MAML, MLP, Sinusoid, TaskBatch, meta_gradients


class Absolute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        return self.second(abs(hidden) + hidden.abs().sqrt() + torch.absolute(hidden))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("make", [Absolute, functools.partial(MLP, 1, 1, (6,))])
@pytest.mark.parametrize(
    "loss",
    [
        F.l1_loss, nn.L1Loss(), nn.L1Loss(reduction="sum"), F.mse_loss,
        lambda p, t: F.l1_loss(p, t, reduction="none").square().mean(),
        lambda p, t: (p - t).abs().mean(),
    ],
    ids=["function", "module", "sum", "squared", "none", "by hand"],
)  # fmt: skip
def test_absolute_values(make: Any, loss: Any, first_order: bool) -> None:
    torch.manual_seed(0)
    model, batch = make().double(), Sinusoid(seed=0).sample(3).to(dtype=torch.float64)
    learner = MAML(0.01, 2, first_order=first_order)
    more: Any = {"loss": loss, "score": "mae"}
    replayed = meta_gradients(
        model, batch, learner, method="verify", **more
    )  # a warning is an error
    looped = meta_gradients(model, batch, learner, method="loop", **more)
    for name in ("rows", "updates", "loss", "score"):
        torch.testing.assert_close(
            getattr(replayed, name), getattr(looped, name), rtol=1e-12, atol=1e-13
        )


def test_at_zero_and_beyond_the_range() -> None:
    """Targets that are met, and numbers that are none."""
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    x, y = torch.ones(2, 4, 2).double(), torch.zeros(2, 4, 1).double()
    y[1, 0] = float("inf")
    batch = TaskBatch(x, y, x, y)
    learner = MAML(0.1, 1)
    more: Any = {"loss": nn.L1Loss(), "score": "mae"}
    replayed = meta_gradients(model, batch, learner, **more)
    looped = meta_gradients(model, batch, learner, method="loop", **more)
    torch.testing.assert_close(replayed.rows, looped.rows, equal_nan=True)
    torch.testing.assert_close(replayed.loss, looped.loss, equal_nan=True)
