"""Sinusoid regression (Finn, Abbeel, Levine 2017, section 5.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gametalearn.episodes import TaskBatch
from gametalearn.errors import require_whole
from gametalearn.randomness import generator

__all__ = ["Sinusoid"]

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
INPUT = (-5.0, 5.0)


class Sinusoid:
    """Tasks y = A sin(x - phi) with A ~ U[0.1, 5], phi ~ U[0, pi] and x ~ U[-5, 5], without noise.

    The sign of the phase is that of the paper's code. Implements `gametalearn.episodes.Source`:
    ``support_x`` and ``support_y`` are ``(T, shots, 1)`` float32, ``query_x`` and ``query_y``
    ``(T, queries, 1)``. Equal seeds give equal tasks.

    Args:
        shots: support points per task.
        queries: query points per task.
        seed: any int64; the start of the stream of tasks.
        group: the objective that all tasks belong to.

    >>> batch = Sinusoid(shots=10, queries=10, seed=0).sample(25)
    >>> tuple(batch.support_x.shape), tuple(batch.query_y.shape)
    ((25, 10, 1), (25, 10, 1))
    """

    def __init__(
        self, shots: int = 10, queries: int = 10, seed: int = 0, *, group: int = 0
    ) -> None:
        for name, value in (("shots", shots), ("queries", queries)):
            require_whole(f"Sinusoid: {name}", value, 1)
        self.shots, self.queries, self.seed, self.group = shots, queries, seed, group
        self.input_shape = (1,)
        self._generator = generator(seed)

    def _uniform(self, bounds: tuple[float, float], *size: int) -> Tensor:
        low, high = bounds
        return low + (high - low) * torch.rand(size, generator=self._generator)

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        """Draw ``num_tasks`` tasks; return those in ``part`` (a process's share of the batch)."""
        require_whole("Sinusoid: num_tasks", num_tasks, 1)
        amplitude = self._uniform(AMPLITUDE, num_tasks, 1, 1)
        phase = self._uniform(PHASE, num_tasks, 1, 1)
        x = self._uniform(INPUT, num_tasks, self.shots + self.queries, 1)
        y = amplitude * torch.sin(x - phase)
        k = self.shots
        group = torch.full((num_tasks,), self.group)
        return TaskBatch(x[:, :k], y[:, :k], x[:, k:], y[:, k:], group)[part]

    def with_seed(self, seed: int) -> Sinusoid:
        """An independent source of the same tasks that starts from ``seed``."""
        return Sinusoid(self.shots, self.queries, seed, group=self.group)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state; restoring it continues the stream of tasks exactly."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._generator.set_state(state["generator"].cpu())  # map_location may have moved it
