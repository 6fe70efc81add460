"""Small modules that several tests are about."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Function"]


class Function(nn.Module):
    """Any function of a tensor as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """What the function gives."""
        output: Tensor = self.function(x)
        return output
