"""The optimiser of a rule's own few numbers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError

__all__ = ["Descent"]


class Descent(nn.Module):
    """Adam (Kingma & Ba 2015) or plain gradient descent on K numbers, some of them absent.

    Equal to `torch.optim.Adam` with its default betas and eps where all K are always present; an
    absent number keeps its value and its moments. The moments are buffers, so a rule's
    ``state_dict()`` restores them.

    Args:
        size: K.
        lr: learning rate.
        optimizer: ``"adam"`` or ``"sgd"``.
    """

    first: Tensor
    second: Tensor
    steps: Tensor

    def __init__(self, size: int, lr: float, optimizer: Literal["adam", "sgd"] = "adam") -> None:
        super().__init__()
        if not lr > 0:
            raise InputError(f"lr: the rule's learning rate must be positive, got {lr}")
        if optimizer not in ("adam", "sgd"):
            raise InputError(
                f"optimizer: the rule's optimiser must be 'adam' or 'sgd', got '{optimizer}'"
            )
        self.lr, self.optimizer = lr, optimizer
        for name in ("first", "second", "steps"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def step(self, value: Tensor, gradient: Tensor, present: Tensor) -> None:
        """Move ``value`` ``(K,)`` against ``gradient``, in place, where ``present``."""
        step = gradient
        if self.optimizer == "adam":
            beta1, beta2, eps = 0.9, 0.999, 1e-8
            self.steps += present
            self.first[present] = (beta1 * self.first + (1 - beta1) * gradient)[present]
            self.second[present] = (beta2 * self.second + (1 - beta2) * gradient**2)[present]
            first = self.first / (1 - beta1**self.steps)
            second = self.second / (1 - beta2**self.steps)
            step = first / (second.sqrt() + eps)
        value[present] -= self.lr * step[present]
