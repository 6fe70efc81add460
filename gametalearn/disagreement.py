"""Tasks that disagree with the others: the case that gradient agreement is argued from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gametalearn.episodes import Source, TaskBatch, draw, input_shape_of
from gametalearn.errors import InputError
from gametalearn.randomness import derived, generator

__all__ = ["Disagreement", "Kind"]

Kind = Literal["shuffled", "permuted", "contradictory", "mismatched"]


class Disagreement:
    """A source in which a share of each meta-batch's tasks has wrong queries.

    Support sets and all other tasks are those of ``source``, whatever the share: runs of different
    shares and kinds see the same episodes. What is wrong with a spoiled task's queries:

    - ``"shuffled"``: their targets are shuffled, differently in each task: noise, which pulls
      every task in another direction.
    - ``"permuted"``: label y is y + 1 (modulo ways) instead, in all spoiled tasks throughout; in
      regression y is -y. All of them share one wrong aim.
    - ``"contradictory"``: the task is a copy of one of the meta-batch's other tasks (support,
      queries and group), with the targets of ``"permuted"``: what one asks for, the other forbids.
      Where all tasks are spoiled there is no other, and each is ``"permuted"``.
    - ``"mismatched"``: the queries, with their targets, are those of another task of the
      meta-batch, of which the support set tells nothing. A task alone stays as it is.

    Args:
        source: of the tasks.
        share: of each meta-batch, in [0, 1]. ``share * T`` is rounded to a neighbouring whole
            number at random, so that the mean is exact; which tasks are spoiled is random too.
        kind: see above.
        seed: of what is random here.

    Attributes:
        spoiled: ``(T,)`` bool, which tasks of the last meta-batch were spoiled: of all T, even if
            ``sample`` was asked for a part of them.

    >>> from gametalearn.data.sinusoid import Sinusoid
    >>> source = Disagreement(Sinusoid(), 0.25, "permuted")
    >>> len(source.sample(8)), int(source.spoiled.sum())
    (8, 2)
    """

    def __init__(
        self, source: Source, share: float, kind: Kind = "shuffled", seed: int = 0
    ) -> None:
        if not 0 <= share <= 1:
            raise InputError(f"Disagreement: share must be in [0, 1], got {share}")
        if kind not in get_args(Kind):
            raise InputError(
                f"Disagreement: kind must be one of {', '.join(get_args(Kind))}; got '{kind}'"
            )
        self.source, self.share, self.kind, self.seed = source, share, kind, seed
        self.spoiled = torch.zeros(0, dtype=torch.bool)
        self._generator = generator(derived(seed, "disagreement"))  # not that of the source

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        """Draw ``num_tasks`` tasks, spoil a share of them, and return those in ``part``."""
        self.spoiled = spoiled = self._draw(num_tasks)
        if self.kind == "mismatched":
            return self._mismatched(num_tasks, part)
        if self.kind == "contradictory":  # a copy may be of a task outside the part
            batch = self.source.sample(num_tasks)
            clean = (~spoiled).nonzero().flatten()
            origin = torch.arange(num_tasks)
            if len(clean):
                key = torch.randint(len(clean), (num_tasks,), generator=self._generator)
                origin = torch.where(spoiled, clean[key], origin)
            batch = batch[origin[part]]
        else:
            batch = draw(self.source, num_tasks, part)
        wrong = _wrong(batch)
        if self.kind == "shuffled":
            key = torch.rand(num_tasks, batch.query_y.shape[1], generator=self._generator)
            tasks = torch.arange(len(batch)).unsqueeze(1)
            wrong = batch.query_y[tasks, key.argsort(1)[part]]
        mask = spoiled[part].view(-1, *[1] * (wrong.ndim - 1))
        return dataclasses.replace(batch, query_y=torch.where(mask, wrong, batch.query_y))

    def _mismatched(self, num_tasks: int, part: slice) -> TaskBatch:
        """The tasks, of which the spoiled ones have the queries of another."""
        if num_tasks == 1:
            self.spoiled = torch.zeros_like(self.spoiled)
        batch = self.source.sample(num_tasks)
        own = torch.arange(num_tasks)
        ahead = torch.randint(max(1, num_tasks - 1), (num_tasks,), generator=self._generator)
        other = torch.where(self.spoiled, (own + 1 + ahead) % num_tasks, own)
        batch = dataclasses.replace(
            batch, query_x=batch.query_x[other], query_y=batch.query_y[other]
        )
        return batch[part]

    @property
    def distinct(self) -> int | None:
        """The source's."""
        return getattr(self.source, "distinct", None)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The source's."""
        return input_shape_of(self.source)

    @property
    def group_names(self) -> Sequence[str] | None:
        """The source's."""
        return getattr(self.source, "group_names", None)

    @property
    def facts(self) -> dict[str, Tensor]:
        """Which tasks of the last meta-batch were spoiled, ``(T,)``."""
        return {"spoiled": self.spoiled}

    def _draw(self, num_tasks: int) -> Tensor:
        """Which tasks are spoiled."""
        extra = float(torch.rand(1, dtype=torch.float64, generator=self._generator))
        # rounding of the product must not make 0.2 * 5 less than 1
        count = math.floor(round(self.share * num_tasks, 9) + extra)
        order = torch.randperm(num_tasks, generator=self._generator)
        return order < count

    def with_seed(self, seed: int) -> Disagreement:
        """An independent source over the same data that starts from ``seed``."""
        return Disagreement(self.source.with_seed(seed), self.share, self.kind, seed)

    def state_dict(self) -> dict[str, Any]:
        """The random states of what is spoiled and of the tasks."""
        return {"generator": self._generator.get_state(), "source": self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._generator.set_state(state["generator"].cpu())  # map_location may have moved it
        self.source.load_state_dict(state["source"])


def _wrong(batch: TaskBatch) -> Tensor:
    """Query targets by the fixed wrong rule: the next label, or the opposite number."""
    if batch.query_y.is_floating_point():
        return -batch.query_y
    if not len(batch):
        return batch.query_y
    ways = int(batch.support_y.max()) + 1  # a support set has every label
    return (batch.query_y + 1) % ways
