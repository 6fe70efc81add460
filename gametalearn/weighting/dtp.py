"""Dynamic task prioritization (Guo, Haque, Huang, Yeung, Fei-Fei 2018, ECCV)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.objectives import ObjectiveBatch, Objectives, over_objectives
from gametalearn.weighting.weights import Weights

__all__ = ["DynamicTaskPrioritization"]


class DynamicTaskPrioritization(nn.Module):
    """Objectives with a low accuracy get more weight: the focal loss of a performance indicator.

        w_i = -(1 - kappa_i)^gamma_i * log kappa_i
        kappa_i(t) = decay * kappa_i(t-1) + (1 - decay) * indicator_i(t)

    kappa_i is the moving average of the indicator, by default the query accuracy, started at its first
    value, the current batch included (``decay`` is 1 - alpha in the paper's symbols). For the weight it
    is clamped to [0.01, 0.99], where w neither diverges nor vanishes. Only the paper's weights over
    objectives are used, not those over examples.

    The paper's weight is steep: with gamma = 1 it is 1.29 at a kappa of 0.2, which is chance in 5-way
    tasks, and 0.0026 at 0.95, so that an objective that is learned is all but left out, and forgotten,
    for the sake of one that may never be learned. Two options are milder: a smaller ``gamma`` (at 0 they are
    1.61 and 0.051, 31 to 1 instead of 500 to 1), and ``indicator="likelihood"`` (ours), exp(-L_i), the geometric mean of
    the probabilities that the right classes get, which is 0.74 and not 0.95 at a loss of 0.3.

    The weights shrink as accuracies rise (0.01 at kappa = 0.9), so the update does too; an adaptive
    meta-optimizer undoes that. An objective that is absent from a meta-batch keeps its kappa; its
    raw weight is 1 until it is first seen. In ``eval()`` nothing moves.

    Args:
        objectives: K, for groups 0 to K - 1, or the groups' identities.
        gamma: the focusing exponent, or one for each objective.
        decay: of the moving average, in [0, 1).
        indicator: ``"accuracy"``, the score, or ``"likelihood"``, exp(-loss) for losses >= 0.
        within: how the tasks of one objective are combined, ``"uniform"`` or ``"agreement"``.
        balance: K shares of the objectives at equal weights; None: equal ones (see `Objectives`).

    There is no such rule for regression, whose score is an error: scores outside of [0, 1] are
    refused, and `make_rule` refuses it by name. ``facts`` has ``kappa`` ``(K,)``.
    """

    gamma: Tensor
    kappa: Tensor
    seen: Tensor

    def __init__(
        self,
        objectives: int | Sequence[int],
        *,
        gamma: float | Sequence[float] = 1.0,
        decay: float = 0.9,
        indicator: Literal["accuracy", "likelihood"] = "accuracy",
        within: Literal["uniform", "agreement"] = "uniform",
        balance: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InputError(f"DynamicTaskPrioritization: decay must be in [0, 1), got {decay}")
        if indicator not in ("accuracy", "likelihood"):
            raise InputError(
                "DynamicTaskPrioritization: indicator must be 'accuracy' or 'likelihood', got "
                f"'{indicator}'"
            )
        self.decay, self.indicator = decay, indicator
        self.facts: dict[str, Tensor] = {}
        self.objectives = Objectives(objectives, within, balance)
        size = len(self.objectives)
        gammas = [gamma] * size if isinstance(gamma, int | float) else list(gamma)
        if len(gammas) != size or min(gammas) < 0:
            raise InputError(
                f"DynamicTaskPrioritization: gamma must be a number >= 0, or {size} of them, one "
                f"for each objective; got {gamma}"
            )
        self.register_buffer("gamma", torch.tensor(gammas, dtype=torch.float64), persistent=False)
        self.register_buffer("kappa", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(size, dtype=torch.bool))

    over_processes = over_objectives

    def forward(self, gradients: TaskGradients) -> Weights:
        """The weights of one meta-batch; raw ones are ``(K,)``.

        Raises:
            InputError: the indicator of a task is not in [0, 1], a loss or a row is not finite, or a
                task's group is unknown.
        """
        likely = self.indicator == "likelihood"
        score = torch.zeros(()) if likely else gradients.score
        bad = (~((score >= 0) & (score <= 1))).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"dtp needs accuracies in [0, 1], the score of task {bad[0]} is "
                f"{float(score[bad[0]])}; for regression use uncertainty, gradnorm or dwa"
            )
        batch = self.objectives.read(gradients, nonnegative_loss=likely)
        kappa, seen = self._averaged(batch, torch.exp(-batch.loss) if likely else batch.score)
        self.facts = {"kappa": torch.where(batch.present, kappa, torch.nan)}
        if self.training:
            self.kappa.copy_(kappa)
            self.seen.copy_(seen)
        raw = focal_weight(kappa.clamp(0.01, 0.99), self.gamma)
        return batch.weights(torch.where(seen, raw, 1.0))

    def _averaged(self, batch: ObjectiveBatch, indicator: Tensor) -> tuple[Tensor, Tensor]:
        """kappa with this batch's indicators, and the objectives for which there is one."""
        moved = torch.where(
            self.seen, self.decay * self.kappa + (1 - self.decay) * indicator, indicator
        )
        return torch.where(batch.present, moved, self.kappa), self.seen | batch.present


def focal_weight(kappa: Tensor, gamma: Tensor) -> Tensor:
    """-(1 - kappa)^gamma * log(kappa), elementwise."""
    return -((1 - kappa) ** gamma) * torch.log(kappa)
