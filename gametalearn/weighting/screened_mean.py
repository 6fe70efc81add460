"""The mean of the tasks that no evidence speaks against (ours; the split is that of Otsu 1979)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError, require_whole
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.objectives import ObjectiveBatch, Objectives
from gametalearn.weighting.sharded import ShardedGradients
from gametalearn.weighting.vectors import Vectors, gramian
from gametalearn.weighting.weights import Weights

__all__ = ["ScreenedMean", "two_kinds"]

FEWEST = 64
"""Losses that an objective must have shown before they are split."""

RECENT = 16
"""Meta-batches whose cosines make up the evidence; half of them are the least."""

SMALLEST = 1e-30
"""Losses below it count as it: their logarithm is taken."""


class ScreenedMean(nn.Module):
    """The mean without tasks that both fail and oppose the others; the plain mean until there are any.

    A task whose query targets are wrong can be told from one that is merely hard by two signs
    together. Its loss stays high after adaptation while that of the others falls, and its gradient
    pulls against theirs. Each objective is screened by itself, in three steps:

    1. The logarithms of the query losses of its last ``window`` tasks are split in two where the
       variance within both parts is least (Otsu 1979). They are two kinds of tasks if the parts are
       further apart than ``apart`` by Ashman's D = sqrt(2) |m_1 - m_2| / sqrt(s_1^2 + s_2^2) (Ashman,
       Bird, Zepf 1994), with means m and standard deviations s, and the upper one has at most half of
       the tasks. Of one normal distribution D is 2.7, and above 3.5 in none of 400 windows.
    2. c is the cosine between the mean gradient of the upper kind in the meta-batch and that of the
       others. Tasks that are merely harder have the same aim, so that c is 0 or more in the mean. The
       t statistic of the last 16 values of c, or of 8 at least, must be below ``-sigma``.
    3. While both hold, tasks of the upper kind have the weight 0, and the others of the objective
       share theirs: e_i = (n / T) / (those that are left), n the tasks of the objective in the
       meta-batch. Otherwise, and where an objective would lose all its tasks, e_i = 1/T.

    So clean tasks are trained as by `Uniform`, to the bit, and weights never drift with noise. What
    it cannot do: where more than half of the tasks are corrupted, or where losses do not separate, it
    stays at the plain mean. In ``eval()`` nothing moves.

    Args:
        objectives: K, for groups 0 to K - 1, or the groups' identities.
        window: tasks of an objective whose losses are remembered.
        apart: the least D of two kinds of tasks.
        sigma: standard errors by which the mean of c must be below 0.

    ``facts`` has for each objective ``apart``, its D; ``opposed``, the mean of the last values of c; and
    ``left_out``, the number of tasks with the weight 0. They are NaN where there is none.
    """

    losses: Tensor
    cosines: Tensor
    seen: Tensor
    measured: Tensor

    def __init__(
        self,
        objectives: int | Sequence[int] = 1,
        *,
        window: int = 256,
        apart: float = 3.5,
        sigma: float = 4.0,
    ) -> None:
        super().__init__()
        require_whole("ScreenedMean: window", window, FEWEST)
        if not apart > 0:
            raise InputError(f"ScreenedMean: apart must be positive, got {apart}")
        if not sigma > 0:
            raise InputError(f"ScreenedMean: sigma must be positive, got {sigma}")
        self.window, self.apart, self.sigma = window, apart, sigma
        self.objectives = Objectives(objectives)
        size = len(self.objectives)
        # The last ones of each objective, at the end of its row, and how many there have been.
        for name, length in (("losses", window), ("cosines", RECENT)):
            self.register_buffer(name, torch.zeros(size, length, dtype=torch.float64))
        for name in ("seen", "measured"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        self.facts: dict[str, Tensor] = {}

    def forward(self, gradients: TaskGradients) -> Weights:
        """Weights ``(T,)``, at least 0, that sum to 1.

        Raises:
            InputError: a loss is negative or not finite, a row is not finite, or a task's group is
                unknown.
        """
        batch = self.objectives.read(gradients, nonnegative_loss=True)

        def combined(mixture: Tensor) -> Tensor:
            vectors = Vectors.of(gradients.rows)
            return vectors.combined(mixture.to(vectors.factor))

        weights = self._screened(batch, combined).to(gradients.rows)
        return Weights(raw=weights, effective=weights)

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        """As in `gametalearn.weighting.sharded`."""
        nothing = gradients.loss.new_zeros(len(gradients), 1)
        seen = TaskGradients(nothing, nothing, gradients.loss, gradients.score, gradients.group)
        batch = self.objectives.read(seen, nonnegative_loss=True)
        weights = self._screened(batch, gradients.combined)
        return Weights(raw=weights, effective=weights), gradients.combined(weights)

    @torch.no_grad()
    def _screened(self, batch: ObjectiveBatch, combined: Callable[[Tensor], Tensor]) -> Tensor:
        """Weights ``(T,)``; ``combined`` gives sums of gradients ``(2, P)`` with weights ``(2, T)``."""
        values = batch.gradients.loss.detach().to(batch.within).clamp(min=SMALLEST).log()
        weights = torch.full_like(values, 1 / len(values))
        names = ("apart", "opposed", "left_out")
        facts = {name: torch.full((len(self.objectives),), math.nan) for name in names}
        for k in batch.present.nonzero().flatten().tolist():
            own = batch.slot == k
            known = self._remembered(k, values[own])
            facts["left_out"][k] = 0
            if len(known) < FEWEST:
                continue
            threshold, apart, share = two_kinds(known)
            facts["apart"][k] = apart
            if apart <= self.apart or share > 0.5:
                continue
            upper = own & (values > threshold)
            lower = own & ~upper
            if self.training and upper.any() and lower.any():
                both = torch.stack([upper, lower]).to(values)
                self._measure(k, combined(both / both.sum(1, keepdim=True)))
            cosines = _last(self.cosines[k], int(self.measured[k]))
            facts["opposed"][k] = cosines.mean()
            if lower.any() and self._opposed(cosines):
                weights[upper] = 0
                weights[lower] = int(own.sum()) / int(lower.sum()) / len(values)
                facts["left_out"][k] = upper.sum()
        self.facts = facts
        return weights

    def _remembered(self, k: int, values: Tensor) -> Tensor:
        """The last log losses of objective k, these among them, which all count."""
        known = torch.cat([_last(self.losses[k], int(self.seen[k])), values])
        if self.training:
            self.losses[k] = torch.cat([self.losses[k], values])[-self.window :]
            self.seen[k] += len(values)
        return known[-max(self.window, len(values)) :]

    def _measure(self, k: int, pair: Tensor) -> None:
        """Keep the cosine of two mean gradients ``(2, P)`` of objective k; none where one is zero."""
        products = gramian(pair)
        lengths = products.diagonal().sqrt()
        if lengths.all():
            cosine = (products[0, 1] / lengths.prod()).to(self.cosines).unsqueeze(0)
            self.cosines[k] = torch.cat([self.cosines[k, 1:], cosine])
            self.measured[k] += 1

    def _opposed(self, cosines: Tensor) -> bool:
        """Whether they are significantly below 0 in the mean."""
        if len(cosines) < RECENT // 2:
            return False
        return bool(cosines.mean() * math.sqrt(len(cosines)) < -self.sigma * cosines.std())


def _last(values: Tensor, count: int) -> Tensor:
    """The last ``count`` of them, or all."""
    return values[max(0, len(values) - count) :]


def two_kinds(values: Tensor) -> tuple[float, float, float]:
    """Split numbers in two where the variance within both parts is least (Otsu 1979).

    Args:
        values: ``(n,)`` finite, n >= 2.

    Returns:
        The threshold, which no part reaches beyond; Ashman's D of the parts, infinite if each has one
        value alone, and 0 if all are equal; and the share of the numbers above the threshold.
    """
    values = values.double().sort().values
    n = len(values)
    below = torch.arange(1, n, dtype=torch.float64, device=values.device)
    above = n - below
    centred = values - values.mean()
    sums, squares = centred.cumsum(0)[:-1], centred.square().cumsum(0)
    means = torch.stack([sums / below, -sums / above])
    between = below * above * (means[1] - means[0]).square()
    between[values[1:] == values[:-1]] = -1  # equal numbers stay together
    best = int(between.argmax())
    if between[best] <= 0:
        return float(values[-1]), 0.0, 0.0
    low, high = squares[best] / below[best], (squares[-1] - squares[best]) / above[best]
    variance = (low - means[0, best] ** 2).clamp(min=0) + (high - means[1, best] ** 2).clamp(min=0)
    distance = float(means[1, best] - means[0, best]) * math.sqrt(2)
    spread = float(variance.sqrt())
    apart = distance / spread if spread > 0 else math.inf
    threshold = float(values[best] + values[best + 1]) / 2
    return threshold, apart, float(above[best]) / n
