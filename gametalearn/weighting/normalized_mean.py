"""The mean of unit-length gradients (Bu, Wang, Zha, Karypis 2023, arXiv 2206.07136, AUTO-V)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gametalearn.gradients import TaskGradients
from gametalearn.weighting.sharded import ShardedGradients
from gametalearn.weighting.vectors import Vectors
from gametalearn.weighting.weights import Weights, check_finite

__all__ = ["NormalizedMean"]


class NormalizedMean(nn.Module):
    """Each gradient is scaled to unit length before the mean, so that no task counts by its length.

    sum_i e_i g_i = (l / T) sum_i g_i / ||g_i||,  so  e_i = l / (T ||g_i||),  l = mean_i ||g_i||

    The paper does this to the gradients of examples, for privacy, and takes l = 1. The mean length l
    is ours: it gives the update the scale of the plain mean, so that the same outer rate suits both,
    and gradients of equal length the weights 1/T. One very long gradient still lengthens the update
    through l, and turns it no further than any other. Stateless; weights are invariant to a common
    scale of the gradients, are at least 0, and need not sum to 1.

    A gradient of length zero has no direction: its weight is 1/T, and it has no part in the mean of l.
    So is one so short that the rows' dtype, or a square in float64, could not hold its length
    relative to the longest: below 1 / the dtype's largest number, or 1.5e-154.
    """

    def forward(self, gradients: TaskGradients) -> Weights:
        """Weights ``(T,)``.

        Raises:
            InputError: a row is not finite; the message names the task.
        """
        rows = gradients.rows
        weights = _weights(Vectors.of(rows).lengths(), rows.dtype).to(rows)
        return Weights(raw=weights, effective=weights)

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        """As in `gametalearn.weighting.sharded`."""
        vectors = Vectors.of(gradients.rows, largest=gradients.processes.largest)
        weights = _weights(gradients.assembled(vectors.lengths()), gradients.rows.dtype)
        return Weights(raw=weights, effective=weights), gradients.combined(weights)


def _weights(length: Tensor, dtype: torch.dtype) -> Tensor:
    """From the lengths ``(T,)``, in whatever unit, of gradients of a dtype."""
    check_finite(length, "gradient")
    least = max(1 / torch.finfo(dtype).max, math.sqrt(torch.finfo(length.dtype).tiny))
    directed = length > least * length.max()
    mean = (length * directed).sum() / directed.sum().clamp(min=1)
    return torch.where(directed, mean / length, 1.0) / len(length)
