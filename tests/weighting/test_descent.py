"""The rules' own optimiser is torch's Adam where nothing is absent."""

from __future__ import annotations

import torch

from gametalearn.weighting.descent import Descent


def test_equals_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.ones(5, dtype=torch.float64)
    parameter = value.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.03)
    descent = Descent(5, 0.03)
    for _ in range(50):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        descent.step(value, gradient, torch.ones(5, dtype=torch.bool))
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-12, atol=1e-14)


def test_an_absent_number_is_as_if_the_step_had_not_been() -> None:
    generator = torch.Generator().manual_seed(0)
    for optimizer in ("adam", "sgd"):
        one, other = (torch.ones(2, dtype=torch.float64) for _ in range(2))
        first, second = (Descent(2, 0.1, optimizer) for _ in range(2))
        for step in range(20):
            gradient = torch.randn(2, generator=generator, dtype=torch.float64)
            present = torch.tensor([True, step % 3 == 0])
            first.step(one, gradient, present)
            if present.all():
                second.step(other, gradient, present)
        assert one[1] == other[1]
        assert one[0] != other[0]
