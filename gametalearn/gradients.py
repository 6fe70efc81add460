"""Per-task meta-gradients: the `TaskGradients` record, and `meta_gradients` that computes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from gametalearn.errors import InputError

__all__ = ["TaskGradients"]


@dataclass(frozen=True)
class TaskGradients:
    """What the inner loops of one meta-batch leave for a weighting rule: T tasks, P parameters.

    P counts the parameters that require gradients, in ``named_parameters()`` order, tied ones once;
    learned inner rates (Meta-SGD) follow them.

    Attributes:
        rows: ``(T, P)`` per-task gradients of the query loss with respect to the initial parameters.
        updates: ``(T, P)`` inner-loop update vectors theta - theta_i.
        loss: ``(T,)`` mean query loss after adaptation.
        score: ``(T,)`` query accuracy in [0, 1] for classification; the mean squared error for
            regression.
        group: ``(T,)`` int64, the objective each task belongs to.
    """

    rows: Tensor
    updates: Tensor
    loss: Tensor
    score: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        if self.rows.ndim != 2:
            raise InputError(f"TaskGradients: rows must be (T, P), got {tuple(self.rows.shape)}")

    def __len__(self) -> int:
        """The number of tasks T."""
        return self.rows.shape[0]

    @staticmethod
    def cat(parts: list[TaskGradients]) -> TaskGradients:
        """Join the tasks of several records."""
        names = [f.name for f in dataclasses.fields(TaskGradients)]
        return TaskGradients(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
