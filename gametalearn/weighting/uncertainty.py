"""Uncertainty weighting (Kendall, Gal, Cipolla 2018, arXiv 1705.07115), and its positive form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.descent import Descent
from gametalearn.weighting.objectives import Objectives, over_objectives
from gametalearn.weighting.weights import Weights

__all__ = ["UncertaintyWeighting"]


class UncertaintyWeighting(nn.Module):
    """Objectives weighted by a learned variance sigma_i^2, w_i = 1 / (2 sigma_i^2).

        kendall:   sum_i L_i / (2 sigma_i^2) + log sigma_i
        positive:  sum_i L_i / (2 sigma_i^2) + log(1 + sigma_i^2)

    The first form is equation 7 of Kendall et al.; the second is that of Liebel & Koerner 2018 (arXiv
    1805.06334), whose second term cannot become negative.

    The sum is minimised over s_i = log sigma_i^2 together with the meta-parameters, one step per
    iteration; the weights of an iteration are those before its step. s starts at 0 (sigma = 1), so
    the weights start at 1/2 and their scale is part of what is learned: with one objective too,
    this is not uniform.

    Where this differs from the papers: Kendall et al. give classification losses the weight
    1 / sigma^2, we give every loss half of it; Liebel & Koerner learn sigma itself, we learn s in
    both forms, which keeps sigma^2 positive. (TorchJD's ``UW`` is the first form, with its s left to
    the caller's optimiser.) An objective that is absent from a meta-batch keeps its s and its
    moments. In ``eval()`` nothing moves.

    Args:
        objectives: K, for groups 0 to K - 1, or the groups' identities.
        form: ``"kendall"`` or ``"positive"``.
        lr: rate of the optimiser of s.
        optimizer: ``"adam"`` or ``"sgd"``, for s.
        within: how the tasks of one objective are combined, ``"uniform"`` or ``"agreement"``.
        balance: K shares of the objectives at equal weights; None: equal ones (see `Objectives`).

    s is the parameter ``log_var`` ``(K,)``, which needs no other optimiser.
    """

    def __init__(
        self,
        objectives: int | Sequence[int],
        *,
        form: Literal["kendall", "positive"] = "kendall",
        lr: float = 0.01,
        optimizer: Literal["adam", "sgd"] = "adam",
        within: Literal["uniform", "agreement"] = "uniform",
        balance: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if form not in ("kendall", "positive"):
            raise InputError(
                f"UncertaintyWeighting: form must be 'kendall' or 'positive', got '{form}'"
            )
        self.form = form
        self.objectives = Objectives(objectives, within, balance)
        size = len(self.objectives)
        self.descent = Descent(size, lr, optimizer)
        self.log_var = nn.Parameter(torch.zeros(size, dtype=torch.float64), requires_grad=False)

    over_processes = over_objectives

    def forward(self, gradients: TaskGradients) -> Weights:
        """The weights of one meta-batch; raw ones are ``(K,)``.

        Raises:
            InputError: a loss or a row is not finite, or a task's group is unknown.
        """
        batch = self.objectives.read(gradients)
        with torch.no_grad():
            raw = torch.exp(-self.log_var) / 2
            if self.training:
                slope = regulariser_slope(self.log_var, self.form)
                self.descent.step(self.log_var, slope - raw * batch.loss, batch.present)
        return batch.weights(raw)


def regulariser_slope(log_var: Tensor, form: str) -> Tensor:
    """d/ds of log sigma = s / 2, or of log(1 + sigma^2) = log(1 + e^s)."""
    return torch.full_like(log_var, 0.5) if form == "kendall" else torch.sigmoid(log_var)
