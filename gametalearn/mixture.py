"""Several sources as one: each is an objective of multi-objective meta-training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from gametalearn.episodes import EpisodeSampler, Source, TaskBatch, draw, input_shape_of
from gametalearn.errors import InputError
from gametalearn.randomness import derived, generator
from gametalearn.shares import divided

__all__ = ["MixedSource", "seed_of"]


class MixedSource:
    """A meta-batch drawn from K sources; the number of a task's source is its ``group``.

    Args:
        sources: K sources whose episodes have equal shapes. Give each a seed of its own, as `with_seed` does:
            samplers of one seed draw the same classes where they have equally many.
        share: ``"fixed"``, equal numbers of tasks per source (the first ones get the remainder), or a
            sequence of K positive weights, by which each task's source is drawn at random.
        counts: K numbers of tasks instead, in proportion to which each meta-batch is divided: their
            sum is divided into just these (`gametalearn.shares.divided`).
        seed: of that draw.

    Raises:
        InputError: the sources' episodes differ in shape (ways, shots, queries or input size), or
            ``share`` or ``counts`` are not K numbers above 0.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        share: Literal["fixed"] | Sequence[float] = "fixed",
        seed: int = 0,
        *,
        counts: Sequence[int] | None = None,
    ) -> None:
        if not sources:
            raise InputError("MixedSource: at least one source is needed")
        self.sources, self.share, self.counts = list(sources), share, counts
        self._generator = generator(derived(seed, "mixture"))
        shapes = [_shape(source) for source in self.sources]
        if len(set(shapes)) > 1:
            raise InputError(
                "MixedSource: objectives need episodes of the same shape (ways, shots, queries, input); "
                "got " + "; ".join(map(_described, range(len(shapes)), self.sources, shapes))
            )
        if share != "fixed" and (len(share) != len(sources) or min(share) <= 0):
            raise InputError(
                f"MixedSource: share needs {len(sources)} positive weights, got {share}"
            )
        if counts is not None and (len(counts) != len(sources) or min(counts) <= 0):
            raise InputError(
                f"MixedSource: counts needs {len(sources)} numbers above 0, got {list(counts)}"
            )
        if counts is not None and share != "fixed":
            raise InputError("MixedSource: share and counts say the same thing twice; give one")

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        """Draw ``num_tasks`` episodes, source after source; return those in ``part``."""
        counts = self.divided(num_tasks)
        if counts is None:
            weights = torch.tensor(self.share, dtype=torch.float64)
            drawn = torch.multinomial(weights, num_tasks, True, generator=self._generator)
            counts = torch.bincount(drawn, minlength=len(self.sources)).tolist()
        batches, wanted, first = [], range(num_tasks)[part], 0
        for i, (source, count) in enumerate(zip(self.sources, counts, strict=True)):
            if count:
                low, high = (min(max(n - first, 0), count) for n in (wanted.start, wanted.stop))
                batch = draw(source, count, slice(low, high))
                batch.group.fill_(i)
                batches.append(batch)
                first += count
        return TaskBatch.cat(batches)

    def divided(self, num_tasks: int) -> list[int] | None:
        """How many of a meta-batch's tasks come from each source; None where that is drawn."""
        if self.share != "fixed":
            return None
        return divided(num_tasks, self.counts or [1] * len(self.sources))

    @property
    def period(self) -> int:
        """The fewest tasks that can be divided just as the shares say; a test draws multiples of it."""
        if self.share != "fixed":
            return 1
        counts = self.counts or [1] * len(self.sources)
        return sum(counts) // math.gcd(*counts)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of every source's inputs."""
        return input_shape_of(self.sources[0])

    @property
    def group_names(self) -> tuple[str, ...]:
        """A name for each source: of its data set if it tells one, and with its number if two are alike."""
        names = [_name(source) for source in self.sources]
        return tuple(
            name if names.count(name) == 1 else f"{name} {number}"
            for number, name in enumerate(names)
        )

    def with_seed(self, seed: int) -> MixedSource:
        """Independent sources over the same data: the first starts from ``seed``, others from seeds of their own.

        With one seed, sources of equal numbers of classes would draw the same classes in the same order.
        """
        sources = [s.with_seed(seed_of(seed, number)) for number, s in enumerate(self.sources)]
        return MixedSource(sources, self.share, seed, counts=self.counts)

    def state_dict(self) -> dict[str, Any]:
        """The random states of the draw and of every source."""
        return {
            "generator": self._generator.get_state(),
            "sources": [s.state_dict() for s in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._generator.set_state(state["generator"])
        for source, inner in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(inner)


def seed_of(seed: int, number: int) -> int:
    """The seed of the ``number``-th source of a mixture that starts from ``seed``."""
    return derived(seed, "source", number) if number else seed


def _shape(source: Source) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Ways (1 for regression), and the shapes of one task's support and query set."""
    task = source.with_seed(0).sample(1)
    ways = 1 if task.support_y.is_floating_point() else len(set(task.support_y.flatten().tolist()))
    return ways, tuple(task.support_x.shape[1:]), tuple(task.query_x.shape[1:])


def _name(source: Source) -> str:
    return source.dataset.name if isinstance(source, EpisodeSampler) else type(source).__name__


def _described(number: int, source: Source, shape: tuple[Any, ...]) -> str:
    name = _name(source)
    ways, support, query = shape
    return f"{number} ({name}) {ways}-way, support {support}, query {query}"
