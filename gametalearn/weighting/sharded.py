"""Rules over rows that stay where they are: each process of a run holds those of its own tasks.

Any rule works over several processes: by default every process gathers all rows, T x P numbers an
iteration, and applies the rule to them. A rule that needs less offers a method for it,

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]

which is called on all processes instead, with the rows of this one. What it needs beyond them it
sums over the processes. The built-in rules do, all but geometric-median, which needs every inner
product, and send:

====================================  ==========================================================
uniform                               P: the sum of the rows
agreement (-update, -cosine)          2P + 2T: S = sum_j g_j, then s_i = <g_i, S> and the lengths of
                                      all tasks, then sum_i w_i g_i
norm-control                          the same
normalized-mean                       P + T: the lengths of all tasks, then sum_i w_i g_i
screened-mean                         P; 3P where losses show two kinds of tasks: their mean gradients
rules over K objectives               K x P: the objectives' gradients; with ``within="agreement"``
                                      2K x P + 2T
====================================  ==========================================================

and one number more for agreement and normalized-mean on float64 rows, their largest entry. All sums
are in float64, and the same on every process to the bit; several processes find what one finds up to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gametalearn.records import one_line
from gametalearn.weighting.vectors import Vectors
from gametalearn.weighting.weights import Rule, Weights

__all__ = ["Processes", "ShardedGradients", "ShardedRule", "sharded_rule"]


class Processes(Protocol):
    """What a rule may ask of the processes of a run; all must call the same, in the same order.

    `gametalearn.distributed.Team` is one. The results are the same on every process, to the bit.
    """

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        ...

    def largest(self, values: Tensor) -> Tensor:
        """The largest of a tensor's entries over the processes, in place."""
        ...

    def assembled(self, own: Tensor, where: slice, count: int) -> Tensor:
        """``(count, ...)``, of which each process gives the part ``where``."""
        ...


@dataclass(frozen=True)
class ShardedGradients:
    """`TaskGradients` of T tasks, of which this process holds the rows of t, perhaps of none.

    Attributes:
        rows, updates: ``(t, P)``, as in `TaskGradients`, of the tasks ``own``.
        loss, score, group: ``(T,)``, of all tasks.
        own: which tasks they are.
        processes: for what no method here sums.
    """

    rows: Tensor
    updates: Tensor
    loss: Tensor
    score: Tensor
    group: Tensor
    own: slice
    processes: Processes

    __repr__ = one_line

    def __len__(self) -> int:
        """The number of tasks T."""
        return len(self.loss)

    def combined(self, weights: Tensor) -> Tensor:
        """sum_i weights_i rows_i over all T tasks, float64; sends as many numbers as it returns.

        Args:
            weights: ``(T,)`` for ``(P,)``, or ``(K, T)`` for K combinations ``(K, P)``.
        """
        rows = self.rows.detach()
        vectors = Vectors(rows, None, rows.new_ones(len(rows), dtype=torch.float64))
        return self.processes.total(vectors.combined(weights[..., self.own].double()))

    def assembled(self, values: Tensor) -> Tensor:
        """The values ``(T, ...)`` of all tasks, of which ``(t, ...)`` are those of the own ones."""
        return self.processes.assembled(values, self.own, len(self))


class ShardedRule(Rule, Protocol):
    """A rule that needs no gathered rows."""

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        """The weights of all T tasks, and the update ``(P,)``, sum_i effective_i * rows_i.

        The same as the rule's weights of all rows and their combination, up to rounding, in any
        floating dtype; and the same on every process, to the bit. State advances as it does there.
        """
        ...


def sharded_rule(rule: Rule) -> ShardedRule | None:
    """The rule itself if it offers ``over_processes``, else None.

    A class that gives its base a new ``forward`` must give it a new ``over_processes``, too: the
    inherited one may compute something else, and is not used.
    """
    for cls in type(rule).__mro__:
        if vars(cls).get("over_processes") is not None:
            return rule  # type: ignore[return-value]
        if not vars(cls).keys().isdisjoint(("over_processes", "forward", "__call__")):
            return None
    return None
