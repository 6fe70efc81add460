"""A weighting rule that limits how much a task with a long gradient counts."""

import torch

from gametalearn import TaskGradients, Weights


class Clipped(torch.nn.Module):
    """w_i = min(1, c * median_j |g_j| / |g_i|) / T.

    Args:
        c: gradients longer than this many times the median are shortened to it. On the command line:
            ``--rule-options clipped.c=2``.
    """

    def __init__(self, c: float = 1.0) -> None:
        super().__init__()
        self.c = c

    def forward(self, gradients: TaskGradients) -> Weights:
        """Weights ``(T,)`` of ``gradients.rows``, ``(T, P)``."""
        length = gradients.rows.norm(dim=1).clamp_min(1e-12)
        weights = (self.c * length.median() / length).clamp(max=1) / len(length)
        return Weights(raw=weights, effective=weights)
