"""One run in several processes: who computes which tasks, and what the processes exchange.

``torchrun --nproc-per-node N -m gametalearn train ...`` starts N processes. All draw the same
episodes; each computes the rows of its own share of the meta-batch and holds no others. What a rule
needs beyond them is summed over the processes (`gametalearn.weighting.sharded`), so that all of them
find the same update, bit for bit, and N processes find what one does up to rounding. Beside that go
4T + 1 numbers (losses, scores, groups, which tasks are finite, who was interrupted). The first
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

from gametalearn.config import TrainConfig
from gametalearn.environment import unusable
from gametalearn.errors import InputError, SharedError, summary
from gametalearn.gradients import TaskGradients
from gametalearn.update import combine
from gametalearn.weighting import Rule, Weights
from gametalearn.weighting.sharded import ShardedGradients, sharded_rule
from gametalearn.weighting.weights import as_weights

__all__ = ["ALONE", "Tasks", "Team", "describe_team", "joined", "use_machine", "weighted_update"]

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for one that neither answers nor ends; one that ends is noticed at once.
Long, since the first process may be preparing a data set."""

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
        least, most = torch.aminmax(gradients.rows, dim=1)  # a sum of finite entries may overflow
        finite = torch.isfinite(least) & torch.isfinite(most) & torch.isfinite(gradients.loss)
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
        """Every row on every process, T x P numbers, and as many if updates are asked for, on all."""
        return gradients if self.size == 1 else _Gathered(gradients, tasks, self)


ALONE = Team()


class _Gathered(TaskGradients):
    """All tasks' rows, and their updates from when they are first asked for: few rules need them."""

    _gather: Callable[[], Tensor]
    _updates: Tensor

    def __init__(self, own: TaskGradients, tasks: Tasks, team: Team) -> None:
        def gathered(values: Tensor) -> Tensor:
            return team.assembled(values, tasks.own, len(tasks))

        found = {"rows": gathered(own.rows), "_gather": lambda: gathered(own.updates)}
        vars(self).update(found, loss=tasks.loss, score=tasks.score, group=tasks.group)

    @property
    def updates(self) -> Tensor:
        if "_updates" not in vars(self):
            vars(self)["_updates"] = self._gather()
        return self._updates


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
            f"another process of this run has ended ({summary(error)}); its own message says why. "
            "What was saved is intact; start again to continue from there"
        ) from error


def use_machine(config: TrainConfig, team: Team) -> None:
    """The config's threads, but of several processes on one machine none more than its share.

    Raises:
        InputError: on every process: its device cannot be used here, or not by so many.
    """
    team.everywhere(lambda: _use_machine(config, team))


def _use_machine(config: TrainConfig, team: Team) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if team.size > 1 else 1
    if config.threads:
        share = max(1, (os.cpu_count() or 1) // local) if local > 1 else config.threads
        torch.set_num_threads(min(config.threads, share))
    if (why := unusable(config.device)) is not None:
        raise InputError(f"`device` {config.device}: {why}; try cpu")
    if local > 1 and (
        config.device not in ("cpu", "cuda")
        or (config.device == "cuda" and local > torch.cuda.device_count())
    ):
        raise InputError(
            f"`device` {config.device}: {local} processes on this machine work on cpu, or on cuda "
            "with a GPU each; lower --nproc-per-node"
        )


def weighted_update(
    rule: Rule, gradients: TaskGradients, tasks: Tasks, team: Team = ALONE
) -> tuple[Weights, Tensor]:
    """A rule's weights of all T tasks, and the update ``(P,)``, sum_i e_i rows_i.

    Args:
        rule: any; over several processes one without ``over_processes`` gathers all rows.
        gradients: this process's tasks, perhaps none.
        tasks: all tasks, all of them finite.
        team: the processes; one alone applies the rule as it is.

    Returns:
        The same on every process, in the dtype of the rows.

    Raises:
        InputError: the rule does not give a weight for each task.
    """
    sharded = sharded_rule(rule)
    if team.size == 1 or sharded is None:
        gradients = team.whole(gradients, tasks)
        weights = as_weights(rule(gradients), gradients, type(rule).__name__)
        return weights, combine(gradients.rows, weights.effective.to(gradients.rows))
    rows, every = gradients.rows, (tasks.loss, tasks.score, tasks.group)
    shards = ShardedGradients(rows, gradients.updates, *every, tasks.own, team)
    weights, update = sharded.over_processes(shards)
    weights = Weights(raw=weights.raw.to(rows), effective=weights.effective.to(rows))
    return weights, update.to(rows)


def describe_team(rule: Rule, team: Team, tasks: int) -> str:
    """What a person should know of a run of several processes, in a line."""
    most = -(-tasks // team.size)
    line = f"{team.size} processes, up to {most} of {tasks} tasks each"
    if sharded_rule(rule) is not None:
        return f"{line}; all rows are gathered only when metrics are logged (cosine matrix)"
    return f"{line}; this rule gathers all rows on every process at each iteration"
