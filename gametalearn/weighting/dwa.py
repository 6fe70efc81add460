"""Dynamic weight average (Liu, Johns, Davison 2019, arXiv 1803.10704)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError, require_whole
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.objectives import ObjectiveBatch, Objectives, loss_ratio, over_objectives
from gametalearn.weighting.weights import Weights

__all__ = ["DynamicWeightAverage"]


class DynamicWeightAverage(nn.Module):
    """Objectives whose losses fall slowly get more weight (equation 7 of the paper).

        w_i(t) = K exp(r_i(t-1) / temperature) / sum_k exp(r_k(t-1) / temperature)
        r_i(t-1) = L_i(t-1) / L_i(t-2)

    L_i(t) is the mean loss of objective i over epoch t, an epoch being ``period`` meta-iterations;
    the weights are 1 in the first two epochs, and always with one objective.

    The paper has epochs of a data set; meta-training has none, hence ``period``. An objective that
    is absent from a meta-batch keeps its weight and its history: its L_i is the mean over the
    iterations where it was present, and an epoch without it changes nothing for it. Those that were
    present share the rest of the sum K by the formula, once they have two epochs. In ``eval()``
    nothing moves.

    Args:
        objectives: K, for groups 0 to K - 1, or the groups' identities.
        temperature: larger is closer to uniform; 2 in the paper.
        period: meta-iterations per epoch.
        within: how the tasks of one objective are combined, ``"uniform"`` or ``"agreement"``.
        balance: K shares of the objectives at equal weights; None: equal ones (see `Objectives`).
    """

    weights: Tensor
    total: Tensor
    count: Tensor
    iteration: Tensor
    last: Tensor
    before: Tensor
    epochs: Tensor

    def __init__(
        self,
        objectives: int | Sequence[int],
        *,
        temperature: float = 2.0,
        period: int = 50,
        within: Literal["uniform", "agreement"] = "uniform",
        balance: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(
                f"DynamicWeightAverage: temperature must be positive, got {temperature}"
            )
        require_whole("DynamicWeightAverage: period", period, 1)
        self.temperature, self.period = temperature, period
        self.objectives = Objectives(objectives, within, balance)
        size = len(self.objectives)
        self.register_buffer("weights", torch.ones(size, dtype=torch.float64))
        for name in ("total", "last", "before"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        for name in ("count", "epochs"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    over_processes = over_objectives

    def forward(self, gradients: TaskGradients) -> Weights:
        """The weights of one meta-batch; raw ones ``(K,)`` sum to K.

        Raises:
            InputError: a loss is negative or not finite, a row is not finite, or a task's group is
                unknown.
        """
        batch = self.objectives.read(gradients, nonnegative_loss=True)
        weights = batch.weights(self.weights.clone())
        if self.training:
            self._record(batch)
        return weights

    @torch.no_grad()
    def _record(self, batch: ObjectiveBatch) -> None:
        self.total += batch.loss
        self.count += batch.present
        self.iteration += 1
        if self.iteration % self.period:
            return
        seen = self.count > 0
        self.before[seen] = self.last[seen]
        self.last[seen] = (self.total / self.count)[seen]
        self.epochs += seen
        self.total.zero_()
        self.count.zero_()
        due = seen & (self.epochs >= 2)
        rates = loss_ratio(self.last[due], self.before[due])
        share = torch.softmax(rates / self.temperature, 0)
        self.weights[due] = self.weights[due].sum() * share
