"""Uniform weights (MAML), and the norm-matched control of gradient agreement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gametalearn.gradients import TaskGradients
from gametalearn.weighting.agreement import agreement_weights, sharded_agreement
from gametalearn.weighting.sharded import ShardedGradients
from gametalearn.weighting.vectors import Vectors, update_length
from gametalearn.weighting.weights import Weights, check_finite, largest_entries

__all__ = ["NormControl", "Uniform"]


class Uniform(nn.Module):
    """w_i = 1/T: the mean over tasks of MAML (Finn et al. 2017, algorithm 1). Stateless."""

    def forward(self, gradients: TaskGradients) -> Weights:
        """Equal weights ``(T,)``.

        Raises:
            InputError: a row is not finite; the message names the task.
        """
        rows = gradients.rows
        check_finite(largest_entries(rows), "gradient")
        weights = rows.new_full((len(rows),), 1 / len(rows))
        return Weights(raw=weights, effective=weights)

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        """As in `gametalearn.weighting.sharded`."""
        weights = torch.full_like(gradients.loss, 1 / len(gradients), dtype=torch.float64)
        return Weights(raw=weights, effective=weights), gradients.combined(weights)


class NormControl(nn.Module):
    """The uniform direction with the length of the agreement update of the same batch (ours).

    w_i = c / T with c = ||sum_j a_j g_j|| / ||sum_j g_j / T||, a the agreement weights. Agreement
    changes both the direction and the length of an update; a comparison without this control
    cannot say which of the two helped. Where agreement falls back to uniform (one task, gradients
    that cancel), c = 1. Stateless.
    """

    def forward(self, gradients: TaskGradients) -> Weights:
        """Equal weights ``(T,)`` that sum to c.

        Raises:
            InputError: a row is not finite; the message names the task.
        """
        rows = gradients.rows
        agreement = agreement_weights(rows)
        uniform = rows.new_full((len(rows),), 1 / len(rows))
        wanted, own = update_length(rows, torch.stack([agreement, uniform])).tolist()
        weights = uniform * (wanted / own if own > 0 else 1.0)
        return Weights(raw=weights, effective=weights)

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        """As in `gametalearn.weighting.sharded`; zero up to rounding is as in `sharded_agreement`."""
        vectors = Vectors.of(gradients.rows, largest=gradients.processes.largest)
        agreement, total = sharded_agreement(gradients, vectors)
        mean = vectors.restored(total[0] / len(gradients))
        uniform = torch.full_like(agreement, 1 / len(gradients))
        factor = 1.0  # where agreement falls back to uniform: its length may be rounding alone
        if not torch.equal(agreement, uniform):
            both = Vectors.of(torch.stack([gradients.combined(agreement), mean]))
            wanted, own = both.lengths().tolist()
            factor = wanted / own if own > 0 else 1.0
        weights = uniform * factor
        return Weights(raw=weights, effective=weights), mean * factor
