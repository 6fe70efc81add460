"""From tasks to objectives and back: what the loss-based rules share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.agreement import agreement_weights, sharded_agreement
from gametalearn.weighting.sharded import ShardedGradients
from gametalearn.weighting.vectors import Vectors
from gametalearn.weighting.weights import Rule, Weights, largest_entries

__all__ = ["ObjectiveBatch", "Objectives", "loss_ratio", "over_objectives"]


MANY = 64
"""Tasks after which a rule has seen more than one of its objectives, if their groups were given."""

ANOTHER_LOSS = (
    "this rule takes ratios or logarithms of losses; use a loss that is at least 0, or a rule that "
    "takes any, such as uncertainty or agreement"
)
"""What to do about a negative loss."""


@dataclass(frozen=True)
class ObjectiveBatch:
    """One meta-batch as a rule over K objectives sees it; float64, on the rule's device.

    Attributes:
        gradients: the record itself.
        slot: ``(T,)`` int64, the index in 0..K-1 of each task's objective.
        present: ``(K,)`` bool, the objectives that have a task in the batch.
        within: ``(T,)`` weights a_i of the tasks inside their objective: the gradient of objective
            k is gbar_k = sum over its tasks of a_i * rows_i.
        balance: ``(K,)`` b_k, the shares of the objectives that are present; they sum to 1.
        loss: ``(K,)`` mean query loss; 0 for an absent objective.
    """

    gradients: TaskGradients
    slot: Tensor
    present: Tensor
    within: Tensor
    balance: Tensor
    loss: Tensor

    @property
    def score(self) -> Tensor:
        """``(K,)`` mean score, 0 for an absent objective; the record is asked for it here alone."""
        score = self.gradients.score.detach().to(self.loss)
        return _means(score, self.slot, len(self.present))

    def weights(self, raw: Tensor) -> Weights:
        """Effective weights e_i = c b_k w_k a_i of raw ones ``(K,)``.

        With equal shares b_k = 1/K, K the objectives present, c is 1, and the update is sum_i e_i
        rows_i = (1/K) sum_k w_k gbar_k. Dividing by those present, not by all, keeps w = 1 the plain
        mean over objectives when some are absent. With other shares w = 1 is the mean in these
        shares, and c = mean(w) / sum_k b_k w_k, so that the objectives' sums c b_k w_k add up to the
        mean of w: what the rule takes from one objective, the others get.
        """
        shares = self.balance * raw
        if not self.equal:
            shares = shares * (raw[self.present].mean() / shares.sum())
        effective = shares[self.slot] * self.within
        rows = self.gradients.rows
        return Weights(raw=raw.to(rows), effective=effective.to(rows))

    @property
    def equal(self) -> bool:
        """Whether all objectives that are present have the same share."""
        shares = self.balance[self.present]
        return bool((shares == shares[0]).all())

    def mixture(self) -> Tensor:
        """``(K, T)``: row k holds the a_i of objective k's tasks, so gbar = mixture @ rows."""
        mixture = self.within.new_zeros(len(self.present), len(self.slot))
        mixture[self.slot, torch.arange(len(self.slot), device=self.slot.device)] = self.within
        return mixture


class Objectives(nn.Module):
    """The objectives of a rule, and how the tasks of one objective are combined.

    Args:
        objectives: the number K, for groups 0 to K - 1, or the groups' identities. The order is
            that of the raw weights.
        within: ``"uniform"``, a_i = 1 / (tasks of the objective), or ``"agreement"``, the weights
            of `agreement_weights` among the objective's own tasks.
        balance: K numbers above 0, in proportion to which the objectives count where their weights are
            equal, such as the numbers of their tasks; None: all the same.
    """

    identities: Tensor
    balance: Tensor

    def __init__(
        self,
        objectives: int | Sequence[int],
        within: Literal["uniform", "agreement"] = "uniform",
        balance: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        identities = list(range(objectives)) if isinstance(objectives, int) else list(objectives)
        if not identities or len(set(identities)) < len(identities):
            raise InputError(
                "objectives: expected a positive number or distinct group identities, "
                f"got {objectives}"
            )
        if within not in ("uniform", "agreement"):
            raise InputError(f"within must be 'uniform' or 'agreement', got '{within}'")
        if balance is not None and (
            len(balance) != len(identities) or not all(0 < b < math.inf for b in balance)
        ):
            raise InputError(
                f"balance: expected {len(identities)} numbers above 0, one for each objective; got "
                f"{list(balance)}"
            )
        self.within = within
        shares = [1.0] * len(identities) if balance is None else list(balance)
        self.register_buffer("balance", torch.tensor(shares, dtype=torch.float64), persistent=False)
        self.register_buffer("identities", torch.tensor(identities))
        self._looked_at, self._met = 0, set[int]()
        self.register_load_state_dict_pre_hook(_same_identities)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """The number K."""
        return len(self.identities)

    def read(self, gradients: TaskGradients, *, nonnegative_loss: bool = False) -> ObjectiveBatch:
        """Sort the tasks of a meta-batch by objective, and check them.

        Raises:
            InputError: a loss or a row is not finite, or a loss is negative under
                ``nonnegative_loss`` (the message names task and objective), or a task belongs to
                none of the objectives.
        """
        rows, device = gradients.rows.detach(), self.identities.device
        slot = self._slots(gradients.group.to(device))
        loss = gradients.loss.detach().to(device, torch.float64)
        self._require(torch.isfinite(loss), slot, "loss", loss, "is not finite")
        largest = largest_entries(rows).to(device)
        self._require(torch.isfinite(largest), slot, "gradient", largest, "is not finite")
        if nonnegative_loss:
            self._require(loss >= 0, slot, "loss", loss, "is negative", ANOTHER_LOSS)
        count = torch.bincount(slot, minlength=len(self)).to(loss)
        per_task = 1 / count[slot]
        shares = torch.where(count > 0, self.balance, 0.0)
        self._warn_of_one(count)
        return ObjectiveBatch(
            gradients=gradients,
            slot=slot,
            present=count > 0,
            within=per_task if self.within == "uniform" else self._agreement(rows, slot),
            balance=shares / shares.sum(),
            loss=_means(loss, slot, len(self)),
        )

    def _warn_of_one(self, count: Tensor) -> None:
        """Warn, once, if the first `MANY` tasks belong to one objective: the others have no part in the weights."""
        if len(self) < 2 or self._looked_at >= MANY:
            return
        self._looked_at += int(count.sum())
        self._met |= {k for k, tasks in enumerate(count.tolist()) if tasks}
        if len(self._met) > 1:
            self._looked_at = MANY
        elif self._looked_at >= MANY:
            one = int(self.identities[min(self._met)])
            warnings.warn(
                f"the first {self._looked_at} tasks belong to one objective, {one}, of the {len(self)} of this rule, "
                "whose weights for objectives have no effect so far; if there are others among them, say which task is "
                "of which: TaskBatch(..., group=...)",
                stacklevel=2,
            )

    def _slots(self, group: Tensor) -> Tensor:
        match = group.unsqueeze(1) == self.identities
        unknown = (~match.any(1)).nonzero().flatten().tolist()
        if unknown:
            known = self.identities.tolist()
            shown = ", ".join(map(str, known[:8])) + (", ..." if len(known) > 8 else "")
            raise InputError(
                f"task {unknown[0]} belongs to group {int(group[unknown[0]])}, the rule's "
                f"objectives are {shown}; make the rule with objectives= every group's identity"
            )
        return match.to(torch.int64).argmax(1)

    def _require(
        self,
        good: Tensor,
        slot: Tensor,
        what: str,
        value: Tensor,
        problem: str,
        remedy: str = "lower the inner learning rate, or leave the task out",
    ) -> None:
        bad = (~good).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"{what} of task {bad[0]} (objective {int(self.identities[slot[bad[0]]])}) {problem} "
                f"({float(value[bad[0]])}); {remedy}"
            )

    def _agreement(self, rows: Tensor, slot: Tensor) -> Tensor:
        weights = torch.empty(len(rows), dtype=torch.float64, device=slot.device)
        for k in sorted(set(slot.tolist())):
            tasks = (slot == k).nonzero().flatten()
            weights[tasks] = agreement_weights(rows[tasks.to(rows.device)]).to(weights)
        return weights


def _means(values: Tensor, slot: Tensor, size: int) -> Tensor:
    """The mean ``(K,)`` of the values ``(T,)`` of each objective's tasks; 0 where it has none."""
    count = torch.bincount(slot, minlength=size).to(values)
    return values.new_zeros(size).index_add(0, slot, values * (1 / count[slot]))


def _same_identities(module: Objectives, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Refuse the state of a rule over other objectives, or of others in their order.

    What is set for each of them is not in the state.
    """
    saved, own = state.get(f"{prefix}identities"), module.identities.tolist()
    if saved is not None and saved.tolist() != own:
        raise InputError(
            f"the state is of a rule over the objectives {saved.tolist()}, and this one has {own}; make it with "
            f"objectives={saved.tolist()}"
        )


class _ObjectiveRule(Rule, Protocol):
    objectives: Objectives


def over_objectives(rule: _ObjectiveRule, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
    """`over_processes` of the rules over objectives (see `gametalearn.weighting.sharded`).

    The rule sees one task an objective: its gradient gbar_k, its mean loss and its mean score, in
    float64.
    """
    present, slot = torch.unique(gradients.group, return_inverse=True)
    members = torch.nn.functional.one_hot(slot).T.double()
    mean = members / members.sum(1, keepdim=True)
    within = mean.sum(0)
    if rule.objectives.within == "agreement":
        vectors = Vectors.of(gradients.rows, largest=gradients.processes.largest)
        within, _ = sharded_agreement(gradients, vectors, slot)
    mixed = gradients.combined(members * within)
    loss, score = mean @ gradients.loss.double(), mean @ gradients.score.double()
    weights = rule(TaskGradients(mixed, mixed[:, :0], loss, score, present))
    effective = weights.effective[slot] * within
    return Weights(raw=weights.raw, effective=effective), weights.effective @ mixed


def loss_ratio(new: Tensor, old: Tensor) -> Tensor:
    """``new / old`` of losses >= 0; 1 where both vanish, a million where only ``old`` does."""
    quotient = (new / torch.where(old > 0, old, 1.0)).clamp(max=1e6)
    return torch.where(old > 0, quotient, torch.where(new > 0, 1e6, 1.0))
