"""Episodes: the `TaskBatch` record, and a sampler of N-way K-shot episodes from labelled examples."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, SupportsIndex, runtime_checkable

import torch
from torch import Tensor

from gametalearn.classes import Classes
from gametalearn.errors import InputError, require_whole
from gametalearn.examples import ClassItems, labelled, read_tasks
from gametalearn.randomness import derived, generator
from gametalearn.records import one_line
from gametalearn.words import counted

__all__ = ["EpisodeSampler", "Source", "TaskBatch", "draw", "input_shape_of", "require_batch"]


@dataclass(frozen=True)
class TaskBatch:
    """T episodes (a meta-batch); S support and Q query examples each.

    Attributes:
        support_x: ``(T, S, *x)`` float inputs; S = ways x shots. Images are ``(C, H, W)`` in [0, 1].
        support_y: ``(T, S)`` int64 labels in ``[0, ways)``; regression ``(T, S, *y)`` float targets.
        query_x: ``(T, Q, *x)``; Q = ways x queries.
        query_y: ``(T, Q)`` int64; regression ``(T, Q, *y)``.
        group: ``(T,)`` int64, the persistent identity of the objective that a task belongs to (a
            data set, an alphabet, a domain). The position in the batch is not an identity. Zeros
            where it is not given: all tasks belong to one objective.
        classes: ``(T, ways)`` int64 class numbers in the source, label 0 first; None for regression.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    group: Tensor = None  # type: ignore[assignment]  # a tensor as soon as the batch is made
    classes: Tensor | None = None

    __repr__ = one_line

    def __post_init__(self) -> None:
        if vars(self)["group"] is None and isinstance(self.support_x, Tensor):
            zeros = torch.zeros(self.support_x.shape[:1], dtype=torch.int64)
            object.__setattr__(self, "group", zeros.to(self.support_x.device))  # it is frozen
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            if not isinstance(value, Tensor) and (value is not None or field.name != "classes"):
                raise InputError(
                    f"TaskBatch: {field.name} must be a tensor, got a {type(value).__name__}; stack what the "
                    "tasks have into one tensor, tasks first"
                )
        tasks = {f: t.shape[0] for f, t in self._tensors() if t.ndim}
        if len(tasks) < len(list(self._tensors())) or len(set(tasks.values())) != 1:
            raise InputError(
                f"TaskBatch: the first dimension of every field must be the number of tasks; got {tasks}"
            )
        for x, y in (("support_x", "support_y"), ("query_x", "query_y")):
            if getattr(self, x).shape[1:2] != getattr(self, y).shape[1:2]:
                raise InputError(
                    f"TaskBatch: {x} {tuple(getattr(self, x).shape)} and "
                    f"{y} {tuple(getattr(self, y).shape)} differ in examples per task"
                )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def __len__(self) -> int:
        """The number of tasks T."""
        return self.support_x.shape[0]

    def __getitem__(self, tasks: SupportsIndex | slice | Sequence[int] | Tensor) -> TaskBatch:
        """A batch of some of the tasks: one by its number, or those of a slice, a list or a tensor.

        A number gives a batch of one task, so that it can be passed on as any other; ``for task in
        batch`` gives each in its turn. Of numbers and slices the tensors are views.

        Raises:
            IndexError: there is no such task.
            InputError: something else than these.
        """
        chosen: Any = tasks
        if isinstance(tasks, SupportsIndex) and not getattr(tasks, "ndim", 0):
            number = operator.index(tasks)
            if not -len(self) <= number < len(self):
                raise IndexError(f"task {number} of a batch of {len(self)}")
            chosen = slice(number % len(self), number % len(self) + 1)
        elif not isinstance(tasks, slice | list | range) and not hasattr(tasks, "__array__"):
            raise InputError(
                "TaskBatch: index tasks by a number, a slice, a list or a tensor of numbers; got "
                f"a {type(tasks).__name__}"
            )
        chosen = list(chosen) if isinstance(chosen, range) else chosen
        return TaskBatch(**{name: tensor[chosen] for name, tensor in self._tensors()})

    def __iter__(self) -> Iterator[TaskBatch]:
        """Each task as a batch of one."""
        return (self[number] for number in range(len(self)))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move every tensor to ``device``; cast inputs and float targets to ``dtype``."""
        moved = {
            name: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
            for name, t in self._tensors()
        }
        return dataclasses.replace(self, **moved)

    @staticmethod
    def cat(batches: Sequence[TaskBatch]) -> TaskBatch:
        """Join batches of equal shapes along the task dimension.

        ``classes`` are kept where all have them.

        Raises:
            InputError: they differ in shape.
        """
        named = [{name for name, _ in batch._tensors()} for batch in batches]
        names = [name for name, _ in batches[0]._tensors() if all(name in own for own in named)]
        for number, batch in enumerate(batches[1:], 1):
            for name in names:
                first, own = (tuple(getattr(one, name).shape[1:]) for one in (batches[0], batch))
                if first != own:
                    raise InputError(
                        f"TaskBatch.cat: '{name}' of a task is {first} in batch 0 and {own} in batch {number}; "
                        "join batches of equal ways, shots, queries and inputs"
                    )
        return TaskBatch(**{n: torch.cat([getattr(b, n) for b in batches]) for n in names})


@runtime_checkable
class Source(Protocol):
    """Where episodes come from: `EpisodeSampler`, `Sinusoid`, or anything with these methods.

    A source may offer more, which is used if present:

    - ``sample(num_tasks, part)``: the share of one process among several, a slice that may be empty.
      Every process draws the same episodes, and builds only its own; see `draw`.
    - ``input_shape``: of one input, so that a model can be built without drawing an episode.
    - ``group_names``: what the numbers in `TaskBatch.group` stand for.
    - ``distinct``: the number of different tasks that it has; more episodes than these repeat some.
    - ``facts``: a dictionary of tensors ``(T,)`` about the tasks of the last meta-batch, which are
      written to ``metrics.jsonl``.
    """

    def sample(self, num_tasks: int) -> TaskBatch:
        """Draw ``num_tasks`` episodes and advance the random state."""
        ...

    def with_seed(self, seed: int) -> Source:
        """An independent source over the same data that starts from ``seed``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The random state, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


def require_batch(batch: object, where: str) -> None:
    """Raise an `InputError` for what is no `TaskBatch`; ``where`` says whose it is."""
    if not isinstance(batch, TaskBatch):
        raise InputError(
            f"{where} a {type(batch).__name__}, not a TaskBatch; make one: TaskBatch(support_x, "
            "support_y, query_x, query_y)"
        )


def draw(source: Source, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
    """The episodes in ``part`` of the next ``num_tasks``; a source need not know of parts.

    Raises:
        InputError: the source gave something else, or another number of them.
    """
    sample: Any = source.sample
    told = part != slice(None) and "part" in inspect.signature(sample).parameters
    batch = sample(num_tasks, part) if told else sample(num_tasks)
    require_batch(batch, f"{type(source).__name__}.sample gave")
    asked = len(range(num_tasks)[part]) if told else num_tasks
    if len(batch) != asked:
        raise InputError(
            f"{type(source).__name__}.sample({num_tasks}) gave {len(batch)} tasks"
            + (f" for {part}" if told else "")
            + f"; it must give {asked}"
        )
    return batch if told or part == slice(None) else batch[part]  # type: ignore[no-any-return]


def input_shape_of(source: Source) -> tuple[int, ...]:
    """The shape of one input, which a source tells or one of its episodes shows."""
    shape = getattr(source, "input_shape", None)
    return tuple(source.with_seed(0).sample(1).support_x.shape[2:] if shape is None else shape)


class EpisodeSampler:
    """N-way K-shot episodes over labelled examples: images, embeddings, tables, tokens.

    The classes of an episode are drawn without replacement and get the labels 0 to ways - 1 in
    random order; support and query examples of a class are drawn together without replacement, so
    they are disjoint. One `torch.Generator` drives everything: equal seeds give equal episodes.

    Args:
        dataset: one of

            - a pair ``(inputs, labels)`` of tensors or arrays, ``(N, *x)`` and ``(N,)`` integers;
            - a map-style data set of ``(example, label)`` pairs such as torchvision's, which is read
              into memory once;
            - a `ClassImages` (see `gametalearn.load_dataset`), a `ClassExamples` or a `ClassItems`,
              which can be divided by ``subset``. The last one reads an item whenever it is drawn.

            8-bit images reach a model as float32 in [0, 1], ``(C, H, W)``; floats as they
            are, without rounding or scaling; and other integers as int64.
        ways: classes per episode, N.
        shots: support examples per class, K.
        queries: query examples per class.
        seed: any int64; the start of the stream of episodes.
        within_group: draw each episode's classes from one group (alphabet, script) of the data set,
            a group with enough classes chosen uniformly, and report it as the task's ``group``.
        group: the objective that all tasks belong to otherwise.
        shuffle_support: support examples in random order rather than class after class, for an
            inner loop on mini-batches (`Reptile`).
        transform: a function of one example, as the model receives it, for augmentation: called for
            each example that is drawn, support and query. What it draws at random from torch, NumPy or
            `random` follows from the sampler's seed and differs from episode to episode; which
            examples an episode contains does not depend on it.

    Raises:
        InputError: the data set has too few classes, or a class too few examples; or it is not one.

    >>> embeddings, labels = torch.randn(60, 16), torch.arange(60) // 10
    >>> batch = EpisodeSampler((embeddings, labels), ways=5, shots=1, queries=3, seed=0).sample(4)
    >>> tuple(batch.support_x.shape), tuple(batch.query_y.shape)
    ((4, 5, 16), (4, 15))
    """

    def __init__(
        self,
        dataset: Classes | Any,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        *,
        within_group: bool = False,
        group: int = 0,
        shuffle_support: bool = False,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        dataset = labelled(dataset)
        for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
            require_whole(f"EpisodeSampler: {name}", value, least)
        self.dataset, self.transform = dataset, transform
        self.ways, self.shots, self.queries = ways, shots, queries
        self.seed, self.within_group, self.group = seed, within_group, group
        self.shuffle_support = shuffle_support
        self._check()
        self._start(seed)
        # The classes that an episode may draw from, padded with -1 to a rectangle: one row for the
        # whole data set, or one row a group.
        pools = [torch.arange(dataset.num_classes)]
        self._pool_group = torch.tensor([group])
        if within_group:
            by_group = [
                (dataset.class_group == g).nonzero().flatten() for g in range(len(dataset.groups))
            ]
            kept = [g for g, members in enumerate(by_group) if len(members) >= ways]
            pools, self._pool_group = [by_group[g] for g in kept], torch.tensor(kept)
        self._pools = torch.nn.utils.rnn.pad_sequence(pools, batch_first=True, padding_value=-1)

    def _start(self, seed: int) -> None:
        self._generator = generator(seed)
        # A separate generator, so that random augmentation leaves the episodes as they are.
        self._augmentation = None
        if self.transform is not None or isinstance(self.dataset, ClassItems):
            self._augmentation = generator(derived(seed, "augmentation"))

    @functools.cached_property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example: (C, H, W) for an image."""
        if self.transform is None:
            return self.dataset.shape
        first = self.dataset.first[:1].unsqueeze(0)
        return tuple(read_tasks(self.dataset, self.transform, first, torch.tensor([0])).shape[2:])

    @property
    def group_names(self) -> tuple[str, ...]:
        """The data set's groups if episodes keep to one; itself otherwise."""
        return tuple(self.dataset.groups) if self.within_group else (self.dataset.name,)

    def _check(self) -> None:
        data, where = self.dataset, f"split '{self.dataset.split}' of '{self.dataset.name}'"
        if self.ways > data.num_classes:
            raise InputError(
                f"EpisodeSampler: {self.ways} ways requested, but {where} has "
                f"{counted(data.num_classes, 'class', 'classes')}; lower `ways` or use another split"
            )
        if self.within_group:
            largest = int(torch.bincount(data.class_group).max())
            if self.ways > largest:
                raise InputError(
                    f"EpisodeSampler: {self.ways} ways within one group requested, but the largest "
                    f"group of {where} has {counted(largest, 'class', 'classes')}; lower `ways`"
                )
        need, smallest = self.shots + self.queries, int(data.count.min())
        if need > smallest:
            name = data.classes[int(data.count.argmin())]
            raise InputError(
                f"EpisodeSampler: {counted(self.shots, 'shot')} + "
                f"{counted(self.queries, 'query', 'queries')} = {need} examples per class requested, but "
                f"class '{name}' in {where} has {smallest}; "
                "lower `shots` or `queries`, or leave this class out"
            )

    def draw(self, num_tasks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the make-up of ``num_tasks`` episodes without touching an example.

        Returns:
            ``classes (T, ways)``, ``examples (T, ways, shots + queries)`` their numbers with the
            support first, and ``group (T,)``, all int64.
        """
        require_whole("EpisodeSampler: num_tasks", num_tasks, 1)
        generator, data = self._generator, self.dataset
        pool = torch.randint(len(self._pools), (num_tasks,), generator=generator)
        members = self._pools[pool]
        key = torch.rand(members.shape, generator=generator).masked_fill_(members < 0, -1.0)
        classes = members.gather(1, key.topk(self.ways, dim=1).indices)
        count = data.count[classes].unsqueeze(-1)
        key = torch.rand(num_tasks, self.ways, int(data.count.max()), generator=generator)
        key.masked_fill_(torch.arange(key.shape[-1]) >= count, -1.0)
        within = key.topk(self.shots + self.queries, dim=-1).indices
        return classes, data.first[classes].unsqueeze(-1) + within, self._pool_group[pool]

    def sample(self, num_tasks: int, part: slice = slice(None)) -> TaskBatch:
        """Draw ``num_tasks`` episodes; read the examples only of those in ``part``.

        ``part`` lets each process of a distributed run take its share of one global meta-batch.
        """
        classes, examples, group = (t[part] for t in self.draw(num_tasks))
        tasks, shots = len(classes), self.shots
        # support examples are ordered by label (unless they are shuffled), as are query examples
        support, query = examples[..., :shots].flatten(1), examples[..., shots:].flatten(1)
        labels = torch.arange(self.ways)
        support_y = labels.repeat_interleave(shots).expand(tasks, -1).contiguous()
        if self.shuffle_support:
            key = torch.rand(num_tasks, self.ways * shots, generator=self._generator)
            order = key.argsort(1)[part]
            support, support_y = support.gather(1, order), support_y.gather(1, order)
        if self._augmentation is None:
            support_x, query_x = self.dataset.take(support), self.dataset.take(query)
        else:
            seeds = torch.randint(2**62, (num_tasks,), generator=self._augmentation)[part]
            both = torch.cat([support, query], 1)
            x = read_tasks(self.dataset, self.transform, both, seeds)
            support_x, query_x = x[:, : support.shape[1]], x[:, support.shape[1] :]
        return TaskBatch(
            support_x=support_x,
            support_y=support_y,
            query_x=query_x,
            query_y=labels.repeat_interleave(self.queries).expand(tasks, -1).contiguous(),
            group=group,
            classes=classes,
        )

    def with_seed(self, seed: int) -> EpisodeSampler:
        """An independent sampler over the same data that starts from ``seed``."""
        other = copy.copy(self)
        other.seed = seed
        other._start(seed)
        return other

    def state_dict(self) -> dict[str, Any]:
        """The generators' states; restoring them continues the stream of episodes exactly."""
        states = {"generator": self._generator, "augmentation": self._augmentation}
        return {name: g.get_state() for name, g in states.items() if g is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InputError: one of the two samplers augments, the other does not.
        """
        if ("augmentation" in state) != (self._augmentation is not None):
            raise InputError(
                "EpisodeSampler: only one of this sampler and the one that saved the state has a transform "
                "or a ClassItems; use the same for both"
            )
        self._generator.set_state(state["generator"].cpu())  # map_location may have moved it
        if self._augmentation is not None:
            self._augmentation.set_state(state["augmentation"].cpu())
