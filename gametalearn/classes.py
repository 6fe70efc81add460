"""What all labelled data sets share, whatever their examples are: classes as ranges of examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from gametalearn.errors import InputError, summary
from gametalearn.records import one_line

__all__ = ["Classes", "by_label", "pairs_of", "read_item", "read_pairs", "stacked"]

T = TypeVar("T")


@dataclass(frozen=True)
class Classes:
    """The classes of one split, as ranges of numbered examples.

    `gametalearn.ClassImages`, `gametalearn.ClassExamples` and `gametalearn.ClassItems` add the examples
    themselves.

    Attributes:
        name: the data set, for messages.
        split: ``train``, ``val`` or ``test``, for messages.
        first: ``(M,)`` int64, the index of each class's first example.
        count: ``(M,)`` int64, the number of its examples.
        classes: M class names.
        class_group: ``(M,)`` int64, the group (alphabet, script, domain) of each class.
        groups: the groups' names.
    """

    name: str
    split: str
    first: Tensor
    count: Tensor
    classes: tuple[str, ...]
    class_group: Tensor
    groups: tuple[str, ...]

    __repr__ = one_line

    def __post_init__(self) -> None:
        if not self.classes:
            raise InputError(
                f"{type(self).__name__} '{self.name}': split '{self.split}' has no classes"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes, M."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        raise NotImplementedError

    def take(self, index: Tensor) -> Tensor:
        """The examples at ``index`` (any shape), ``(*index, *shape)``."""
        raise NotImplementedError

    def subset(
        self, keep: Iterable[int] | Tensor | np.ndarray[Any, Any], split: str | None = None
    ) -> Self:
        """Some of the classes, over the same examples.

        Args:
            keep: the classes' indices, or a mask of one bool per class; a tensor, an array or any
                iterable.
            split: names them in messages.

        Raises:
            InputError: an index that is no integer, is out of range or appears twice; a mask of
                another length; or no classes.
        """
        chosen = _chosen(keep, self.num_classes, f"{type(self).__name__} '{self.name}'")
        return dataclasses.replace(
            self,
            split=self.split if split is None else split,
            first=self.first[chosen],
            count=self.count[chosen],
            classes=tuple(self.classes[i] for i in chosen.tolist()),
            class_group=self.class_group[chosen],
        )


def _chosen(keep: Any, number: int, what: str) -> Tensor:
    """The indices that ``keep``, as in `Classes.subset`, chooses of ``number`` classes."""
    try:
        given = keep.numpy(force=True) if isinstance(keep, Tensor) else keep
        given = given if isinstance(given, np.ndarray) else np.array(list(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what}: subset takes a list of indices ({summary(error)})") from error
    if given.dtype == np.bool_:
        if given.shape != (number,):
            raise InputError(
                f"{what}: a mask for subset has one value per class, {number}, got shape {given.shape}"
            )
        return torch.from_numpy(np.flatnonzero(given))
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise InputError(
            f"{what}: subset takes one integer per class, or a mask of bool, got {given.dtype} of "
            f"shape {given.shape}"
        )
    indices = [int(i) for i in given]
    if outside := [i for i in indices if not 0 <= i < number]:
        raise InputError(
            f"{what}: subset got index {outside[0]}, but its {number} classes have the indices 0 to "
            f"{number - 1}"
        )
    if twice := [i for i, times in Counter(indices).items() if times > 1]:
        raise InputError(f"{what}: subset got index {twice[0]} twice; name each class once")
    return torch.tensor(indices, dtype=torch.int64)


def by_label(
    labels: Tensor | Sequence[int], name: str, examples: int
) -> tuple[Tensor, dict[str, Any]]:
    """The order that groups examples by class, and the fields of `Classes`.

    Args:
        labels: N integers, one per example.
        name: the data set.
        examples: N.

    Raises:
        InputError: labels of the wrong number, shape or type.
    """
    try:
        label = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"'{name}': labels must be integers ({summary(error)})") from error
    if len(label.shape) != 1 or label.is_floating_point() or label.is_complex():
        raise InputError(
            f"'{name}': labels must be one integer per example, got "
            f"{str(label.dtype).removeprefix('torch.')} {tuple(label.shape)}"
        )
    if examples != len(label):
        raise InputError(f"'{name}': {examples} examples but {len(label)} labels")
    order = torch.argsort(label, stable=True)
    values, count = torch.unique_consecutive(label[order], return_counts=True)
    return order, {
        "name": name,
        "first": count.cumsum(0) - count,
        "count": count,
        "classes": tuple(str(v) for v in values.tolist()),
        "class_group": torch.zeros(len(values), dtype=torch.int64),
        "groups": (name,),
    }


def read_pairs(dataset: Any, name: str, read: Callable[[Any], Tensor]) -> tuple[Tensor, list[int]]:
    """A map-style data set's items, converted by ``read``, in one tensor, and their labels.

    Raises:
        InputError: not a map-style data set, no items, an item that cannot be read (the message names
            it), items of different shapes or types, or items that differ from one reading to the next.
    """
    pairs = list(pairs_of(dataset, name, read))
    if not pairs:
        raise InputError(f"{name}: the data set holds no examples")
    inputs, labels = stacked([x for x, _ in pairs], name), [label for _, label in pairs]
    for before, (again, _) in zip(inputs[:AGAIN], pairs_of(dataset, name, read), strict=False):
        if not torch.equal(before.nan_to_num(), again.nan_to_num()):
            raise InputError(
                f"{name}: its items differ from one reading to the next (a random transform?), but in "
                "memory they would be fixed; give the sampler ClassItems.from_pairs(dataset), which "
                "reads an item again whenever it is drawn"
            )
    return inputs, labels


AGAIN = 8
"""The number of items that are read twice, to detect random ones."""


def pairs_of(dataset: Any, name: str, read: Callable[[Any], T]) -> Iterator[tuple[T, int]]:
    """Each item of a map-style data set, converted by ``read``, and its label; errors as `read_pairs`."""
    try:
        for i in range(len(dataset)):
            item, label = dataset[i]
            yield read_item(item, f"item {i} of {name}", read), _label(label)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"EpisodeSampler: dataset {name} is neither a ClassImages, ClassExamples or ClassItems, "
            f"nor a pair of tensors, nor a map-style data set of (example, label) pairs: {error}"
        ) from error


def read_item(item: Any, what: str, read: Callable[[Any], T]) -> T:
    """``read(item)``; an `InputError` says that ``what`` cannot be read."""
    try:
        return read(item)
    except Exception as error:  # Pillow decodes on first use, and may raise anything
        raise InputError(f"EpisodeSampler: {what} cannot be read: {summary(error)}") from error


def _label(label: Any) -> int:
    number = np.asarray(label)  # some data sets return arrays of one number
    if number.size != 1 or number.dtype.kind not in "iu":
        raise TypeError(f"a label must be an integer, got {str(label)[:60]}")
    return int(number.item())


def stacked(examples: Sequence[Tensor], name: str) -> Tensor:
    """Examples of one shape and type as one tensor.

    Raises:
        InputError: they differ.
    """
    kinds = {(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in examples}
    if len(kinds) != 1:
        shown = " and ".join(f"{shape} {dtype}" for shape, dtype in sorted(kinds)[:3])
        raise InputError(
            f"{name}: all examples must have one shape and type, got {shown}; resize images and convert "
            "them to one mode, or pad sequences"
        )
    return torch.stack(list(examples))
