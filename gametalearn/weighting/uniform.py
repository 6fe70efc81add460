"""Uniform weights (MAML), and the norm-matched control of gradient agreement."""

from __future__ import annotations

import torch
from torch import nn

from gametalearn.gradients import TaskGradients
from gametalearn.weighting.agreement import agreement_weights_from_gramian, gramian
from gametalearn.weighting.weights import Weights

__all__ = ["NormControl", "Uniform"]


class Uniform(nn.Module):
    """w_i = 1/T: the mean over tasks of MAML (Finn et al. 2017, algorithm 1). Stateless."""

    def forward(self, gradients: TaskGradients) -> Weights:
        """Equal weights ``(T,)``."""
        rows = gradients.rows
        weights = rows.new_full((len(rows),), 1 / len(rows))
        return Weights(raw=weights, effective=weights)


class NormControl(nn.Module):
    """The uniform direction with the length of the agreement update of the same batch (ours).

    w_i = c / T with c = ||sum_j a_j g_j|| / ||sum_j g_j / T||, a the agreement weights. Agreement
    changes both the direction and the length of an update; a comparison without this control
    cannot say which of the two helped. Where the mean vanishes, c = 1. Stateless.
    """

    def forward(self, gradients: TaskGradients) -> Weights:
        """Equal weights ``(T,)`` that sum to c."""
        products = gramian(gradients.rows)
        tasks = len(products)
        agreement = agreement_weights_from_gramian(products)
        uniform = torch.full_like(agreement, 1 / tasks)
        wanted, own = (float(w @ products @ w) ** 0.5 for w in (agreement, uniform))
        scale = wanted / own if own > 0 else 1.0
        weights = gradients.rows.new_full((tasks,), scale / tasks)
        return Weights(raw=weights, effective=weights)
