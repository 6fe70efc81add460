"""One run in several processes: what they exchange, and rules over rows that stay where they are.

``torchrun --nproc-per-node N -m gametalearn train ...`` starts N processes. All draw the same
episodes; each computes the rows of its own share of the meta-batch and holds no others. What a rule
needs beyond them is summed over the processes, in float64, so that all of them find the same
update, bit for bit, and N processes find what one does up to rounding:

====================================  ==========================================================
uniform                               P: the sum of the rows
agreement (-update, -cosine)          2P + 2T + 2: S = sum_j g_j, then sum_i s_i g_i with s_i = <g_i, S>
norm-control                          the same
rules over K objectives               K x P: the objectives' gradients (twice with
                                      ``within="agreement"``)
torchjd:NAME                          T x P: every row, on every process
====================================  ==========================================================

Beside them go 4T + 1 numbers (losses, scores, groups, which tasks are finite, who was interrupted).
Where gradients cancel and agreement falls back to uniform, the plain mean costs P more. The first
process reads and writes all files.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gametalearn.errors import InputError, SharedError, summary
from gametalearn.gradients import TaskGradients
from gametalearn.update import combine
from gametalearn.weighting import GradientAgreement, NormControl, Rule, Uniform, Weights
from gametalearn.weighting.agreement import TOLERANCE
from gametalearn.weighting.objectives import Objectives
from gametalearn.weighting.weights import largest_entries

__all__ = ["ALONE", "Tasks", "Team", "joined", "told", "weigh"]

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for one that neither answers nor ends; one that ends is noticed at once.
Long, since the first process may be preparing a data set."""

SLICE = 2**18
"""Entries of a slice of columns in float64: 2 MB, which stay in the cache."""

R = TypeVar("R")


@dataclass(frozen=True)
class Tasks:
    """What every process knows of all T tasks of a meta-batch.

    Attributes:
        loss, score, group: ``(T,)``, as in `TaskGradients`.
        finite: ``(T,)`` bool, whether a task's loss and gradient are.
        own: the tasks whose rows this process holds.
        stop: whether a process was interrupted.
    """

    loss: Tensor
    score: Tensor
    group: Tensor
    finite: Tensor
    own: slice
    stop: bool

    def __len__(self) -> int:
        """The number of tasks T."""
        return len(self.loss)

    def only(self, kept: Tensor) -> Tasks:
        """Those where ``kept (T,)`` is true."""
        before, own = int(kept[: self.own.start].sum()), int(kept[self.own].sum())
        loss, score, group, finite = (
            t[kept] for t in (self.loss, self.score, self.group, self.finite)
        )
        return Tasks(loss, score, group, finite, slice(before, before + own), self.stop)


@dataclass(frozen=True)
class Team:
    """The processes of a run; by default this one alone, for which nothing here communicates.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that reads and writes files."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` tasks; sizes differ by one at the most.

        >>> [Team(rank, 3).share(5) for rank in range(3)]
        [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        if self.size > 1:
            with _lost():
                dist.all_reduce(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest of a tensor's entries over the processes, in place."""
        if self.size > 1:
            with _lost():
                dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def assembled(self, own: Tensor, where: slice, count: int) -> Tensor:
        """``(count, ...)``, of which each process gives the part ``where``."""
        if self.size == 1:
            return own
        whole = own.new_zeros(count, *own.shape[1:])
        whole[where] = own
        return self.total(whole)

    def objects(self, value: R) -> list[R]:
        """Every process's ``value``, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(values, value)
        return values

    def everywhere(self, work: Callable[[], R]) -> R:
        """What ``work()`` gives here; where it raises an `InputError` on one process, all do."""
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except InputError as caught:
            error = caught
        messages = [m for m in self.objects(None if error is None else str(error)) if m is not None]
        if messages:
            raise SharedError(messages[0]) from error
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], R]) -> R:
        """What ``work()`` gives on the first process, handed to all; or its `InputError`."""
        if self.size == 1:
            return work()
        box = self.everywhere(lambda: [work() if self.first else None])
        with _lost():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def tasks(self, gradients: TaskGradients, count: int, stop: bool) -> Tasks:
        """Tell all processes of the tasks that are computed here, out of ``count``."""
        finite = torch.isfinite(gradients.rows.sum(1)) & torch.isfinite(gradients.loss)
        loss, score, group = gradients.loss, gradients.score, gradients.group
        if self.size == 1:
            return Tasks(loss, score, group, finite, slice(0, count), stop)
        own = self.share(count)
        table = loss.new_zeros(4 * count + 1, dtype=torch.float64)
        columns = table[1:].view(4, count)
        for column, values in zip(columns, (loss, score, group, finite), strict=True):
            column[own] = values.to(table)
        table[0] = float(stop)
        self.total(table)
        return Tasks(
            columns[0].to(loss),
            columns[1].to(score),
            columns[2].to(group),
            columns[3] > 0,
            own,
            bool(table[0] > 0),
        )

    def whole(self, gradients: TaskGradients, tasks: Tasks) -> TaskGradients:
        """Every row on every process, T x P numbers; without the updates, which no caller needs."""
        if self.size == 1:
            return gradients
        rows = self.assembled(gradients.rows, tasks.own, len(tasks))
        return TaskGradients(rows, rows[:, :0], tasks.loss, tasks.score, tasks.group)


ALONE = Team()


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """Join the processes that torchrun started (gloo for CPUs, NCCL for GPUs), if it did.

    torchrun's usual flags apply, those for several machines too. On a machine with GPUs process i
    takes GPU i for ``device="cuda"``.

    >>> with joined() as team:
    ...     team
    Team(rank=0, size=1)

    Raises:
        InputError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot join the other processes at {os.environ['MASTER_ADDR']}:"
            f"{os.environ.get('MASTER_PORT')} ({summary(error)}); check torchrun's --rdzv-endpoint"
        ) from error
    yield Team(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # after an error the others may be gone: then exit as we are


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"another process of this run is gone ({summary(error)}); its own message tells why. "
            "What was saved is intact: start again to go on from there"
        ) from error


def weigh(
    rule: Rule, gradients: TaskGradients, tasks: Tasks, team: Team = ALONE
) -> tuple[Weights, Tensor]:
    """A rule's weights of all T tasks, and the update ``(P,)``, sum_i e_i rows_i.

    Args:
        rule: any; one that is not in the table above gathers all rows.
        gradients: this process's tasks, perhaps none.
        tasks: all tasks, all of them finite.
        team: the processes; one alone applies the rule as it is.

    Returns:
        The same on every process, in the dtype of the rows.

    For agreement over several processes sum |G_ij| is not at hand, and its bound (sum ||g_i||)^2
    decides what counts as zero up to rounding: sum |s| <= 4 * eps * (sum ||g_i||)^2.
    """
    rows, count = gradients.rows, len(tasks)
    if team.size == 1:
        weights = rule(gradients)
        return weights, combine(rows, weights.effective)
    one = torch.zeros(count, dtype=torch.int64, device=rows.device)  # all tasks in one group
    if isinstance(rule, Uniform):
        raw, update = _mean(team, rows, tasks, one)
    elif isinstance(rule, GradientAgreement):
        vectors = rows if rule.signal == "meta_gradient" else gradients.updates
        raw, update, _ = _agreement(team, rows, vectors, tasks, one, rule.normalize)
    elif isinstance(rule, NormControl):
        raw, update = _norm_control(team, rows, tasks, one)
    elif _by_objective(rule):
        return _over_objectives(team, rule, gradients, tasks)
    else:
        gradients = team.whole(gradients, tasks)
        weights = rule(gradients)
        return weights, combine(gradients.rows, weights.effective)
    return Weights(raw=raw.to(rows), effective=raw.to(rows)), update[0].to(rows)


def told(rule: Rule, team: Team, tasks: int) -> str:
    """What a person should know of a run of several processes, in a line."""
    most = -(-tasks // team.size)
    line = f"{team.size} processes, up to {most} of {tasks} tasks each"
    if isinstance(rule, (Uniform, GradientAgreement, NormControl)) or _by_objective(rule):
        return f"{line}; all rows are gathered only when metrics are logged (cosine matrix)"
    return f"{line}; this rule gathers all rows on every process at each iteration"


def _by_objective(rule: Rule) -> bool:
    return isinstance(getattr(rule, "objectives", None), Objectives)


def _mix(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights (K, t) @ rows (t, P)`` in float64, without a copy of the rows in it."""
    mixed = weights.new_empty(len(weights), rows.shape[1], dtype=torch.float64)
    width = max(1, SLICE // max(1, len(rows)))
    for target, part in zip(mixed.split(width, 1), rows.split(width, 1), strict=True):  # type: ignore[no-untyped-call]
        target.copy_(weights.double() @ part.double())
    return mixed


def _products(rows: Tensor, others: Tensor) -> Tensor:
    """``rows (t, P) @ others (K, P).T`` in float64."""
    products = others.new_zeros(len(rows), len(others))
    width = max(1, SLICE // max(1, len(rows)))
    for part, other in zip(rows.split(width, 1), others.split(width, 1), strict=True):  # type: ignore[no-untyped-call]
        products.addmm_(part.double(), other.T)
    return products


def _lengths(rows: Tensor) -> tuple[Tensor, Tensor]:
    """a and b ``(t,)`` float64: a row's largest entry (1 if it is zero), its length divided by a."""
    largest = largest_entries(rows).double()
    largest = torch.where(largest > 0, largest, 1.0)
    square = torch.zeros_like(largest)
    for part in rows.split(max(1, SLICE // max(1, len(rows))), 1):  # type: ignore[no-untyped-call]
        square += (part.double() / largest.unsqueeze(1)).square().sum(1)
    return largest, square.sqrt()


def _members(slot: Tensor) -> Tensor:
    """``(K, T)`` float64, 1 where task i belongs to group k = slot[i]."""
    return torch.nn.functional.one_hot(slot).T.double()


def _mean(team: Team, rows: Tensor, tasks: Tasks, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Equal weights ``(T,)`` within each of K groups of tasks, and the combinations ``(K, P)``."""
    members = _members(slot)
    mixture = members / members.sum(1, keepdim=True)
    return mixture.sum(0), team.total(_mix(mixture[:, tasks.own], rows))


def _agreement(
    team: Team, rows: Tensor, vectors: Tensor, tasks: Tasks, slot: Tensor, normalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Agreement within each of K groups of tasks: weights ``(T,)``, combinations and means ``(K, P)``.

    ``vectors`` are those that must agree, and the means are theirs. Everything is divided by the largest
    entry (or each vector by its own length) before it is multiplied, so products stay in range.
    """
    own, members = tasks.own, _members(slot)
    peak, length = _lengths(vectors)
    scale = peak.new_zeros(2)  # of vectors and of rows
    if len(rows):
        scale[0], scale[1] = peak.max(), largest_entries(rows).max()
    scale = team.largest(scale)
    scale = torch.where(scale > 0, scale, 1.0)
    if normalize:
        inverse, length = 1 / peak / torch.where(length > 0, length, 1.0), (length > 0).double()
    else:
        inverse, length = (1 / scale[0]).expand(len(rows)), peak / scale[0] * length
    total = team.total(_mix(members[:, own] * inverse, vectors))
    s = _products(vectors, total).gather(1, slot[own].unsqueeze(1)).squeeze(1) * inverse
    # The second sum carries s and the lengths of all tasks behind the combinations.
    payload = total.new_zeros(total.numel() + 2 * len(tasks))
    combined, everyone = (
        payload[: total.numel()].view_as(total),
        payload[total.numel() :].view(2, -1),
    )
    combined.copy_(_mix(members[:, own] * s / scale[1], rows))
    everyone[0, own], everyone[1, own] = s, length
    team.total(payload)
    size, bound = members @ everyone[0].abs(), (members @ everyone[1]).square()
    flat = size <= TOLERANCE * torch.finfo(vectors.dtype).eps * bound
    size = torch.where(flat, 1.0, size)
    weights = everyone[0] / size[slot]
    combined = combined * (scale[1] / size).unsqueeze(1)
    means = total * (scale[0] / members.sum(1, keepdim=True))
    if bool(flat.any()):  # on every process, since all found the same sums
        uniform, mixed = _mean(team, rows, tasks, slot)
        weights = torch.where(flat[slot], uniform, weights)
        combined = torch.where(flat.unsqueeze(1), mixed, combined)
        if vectors is rows:
            means = torch.where(flat.unsqueeze(1), mixed, means)
    return weights, combined, means


def _norm_control(team: Team, rows: Tensor, tasks: Tasks, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The uniform direction with the length of the agreement update."""
    _, agreement, mean = _agreement(team, rows, rows, tasks, slot)
    (a, wanted), (b, own) = (_lengths(v) for v in (agreement, mean))
    factor = torch.where(own > 0, wanted / own * (a / b), 1.0)
    return (factor / len(tasks)).expand(len(tasks)), mean * factor


def _over_objectives(
    team: Team, rule: Rule, gradients: TaskGradients, tasks: Tasks
) -> tuple[Weights, Tensor]:
    """The rule sees one task an objective: the objective's gradient, mean loss and mean score."""
    rows = gradients.rows
    present, slot = torch.unique(tasks.group, return_inverse=True)
    if rule.objectives.within == "agreement":  # type: ignore[attr-defined]
        within, mixed, _ = _agreement(team, rows, rows, tasks, slot)
    else:
        within, mixed = _mean(team, rows, tasks, slot)
    members = _members(slot)
    loss, score = (members @ t.double() / members.sum(1) for t in (tasks.loss, tasks.score))
    weights = rule(TaskGradients(mixed, mixed[:, :0], loss, score, present))
    effective = weights.effective[slot] * within
    update = weights.effective @ mixed
    return Weights(raw=weights.raw.to(rows), effective=effective.to(rows)), update.to(rows)
