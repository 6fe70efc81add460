"""`TaskGradients` of chosen numbers, for weighting rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gametalearn import TaskGradients

__all__ = ["record"]


def record(
    rows: Tensor | None = None,
    *,
    updates: Tensor | None = None,
    loss: Tensor | Sequence[float] | None = None,
    score: Tensor | Sequence[float] | None = None,
    group: Sequence[int] | None = None,
) -> TaskGradients:
    """Tasks with what is given; rows of ones, losses of 1, scores of 0.5 and one objective otherwise."""
    tasks = len(next(part for part in (rows, loss, score) if part is not None))
    if rows is None:
        dtype = loss.dtype if isinstance(loss, Tensor) else torch.float64
        rows = torch.ones(tasks, 3, dtype=dtype)
    losses = torch.ones(tasks) if loss is None else torch.as_tensor(loss)
    scores = torch.full((tasks,), 0.5) if score is None else torch.as_tensor(score)
    groups = torch.zeros(tasks, dtype=torch.int64) if group is None else torch.tensor(group)
    return TaskGradients(rows, rows if updates is None else updates, losses, scores, groups)
