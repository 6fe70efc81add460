"""Meta-batches for your own training loop, as `torch.utils.data.DataLoader` yields batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gametalearn.episodes import Source, TaskBatch, draw
from gametalearn.errors import require_whole

__all__ = ["TaskLoader"]


class TaskLoader:
    """Meta-batches of a source, one after another: ``for batch in TaskLoader(source, 16, 1000)``.

    It does not prefetch. So ``source.state_dict()``, saved between two batches, continues with the
    next one, and a second ``for`` over the loader continues with new episodes rather than starting over.

    Args:
        source: `EpisodeSampler`, or any other `gametalearn.episodes.Source`.
        num_tasks: T, the tasks of a meta-batch.
        batches: how many each iteration over the loader yields; None for no end.
        device, dtype: where to move the tensors, and the type of their floats; unchanged by default.

    Raises:
        InputError: ``num_tasks`` or ``batches`` is below 1.

    >>> from gametalearn.data.sinusoid import Sinusoid
    >>> loader = TaskLoader(Sinusoid(), num_tasks=4, batches=3)
    >>> len(loader), [len(batch) for batch in loader]
    (3, [4, 4, 4])
    """

    def __init__(
        self,
        source: Source,
        num_tasks: int,
        batches: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("num_tasks", num_tasks), ("batches", batches)):
            if value is not None:
                require_whole(f"TaskLoader: {name}", value, 1)
        self.source, self.num_tasks, self.batches = source, num_tasks, batches
        self.device, self.dtype = device, dtype

    def __iter__(self) -> Iterator[TaskBatch]:
        """The next meta-batches of the source."""
        drawn = 0
        while self.batches is None or drawn < self.batches:
            yield draw(self.source, self.num_tasks).to(self.device, self.dtype)
            drawn += 1

    def __len__(self) -> int:
        """The number of meta-batches; `TypeError` if there is no end."""
        if self.batches is None:
            raise TypeError("a TaskLoader without `batches` has no end, and so no length")
        return self.batches
