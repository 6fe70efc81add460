"""Labelled examples of any kind: one tensor of floats or integers, or items that are read when drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gametalearn.classes import Classes, by_label, pairs_of, read_item, read_pairs, stacked
from gametalearn.errors import InputError, summary
from gametalearn.images import ClassImages
from gametalearn.pixels import to_uint8
from gametalearn.randomness import seeded, start_from, undisturbed
from gametalearn.records import one_line

__all__ = ["ClassExamples", "ClassItems", "as_input", "labelled", "read_tasks"]

EIGHT_BIT = ("bool", "uint8", "uint16")
"""Pixel types; see `gametalearn.pixels.eight_bit`."""


@dataclass(frozen=True)
class ClassExamples(Classes):
    """The classes of one split, as ranges of one tensor of embeddings, tables, tokens or anything else.

    Attributes:
        inputs: ``(N, *x)`` floats of any precision, or int64, each class contiguous.
        name, split, first, count, classes, class_group, groups: as in
            `gametalearn.classes.Classes`.

    >>> data = ClassExamples.from_tensors(torch.randn(60, 8), torch.arange(60) // 10)
    >>> train, test = data.subset(range(4), "train"), data.subset(range(4, 6), "test")
    >>> train.num_classes, test.classes, test.shape
    (4, ('4', '5'), (8,))
    """

    inputs: Tensor

    __repr__ = one_line

    def __post_init__(self) -> None:
        if not (self.inputs.is_floating_point() or self.inputs.dtype == torch.int64):
            raise InputError(
                f"ClassExamples '{self.name}': inputs must be floats or int64, got "
                f"{self.inputs.dtype}; ClassExamples.from_tensors converts them"
            )
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.inputs.shape[1:])

    def take(self, index: Tensor) -> Tensor:
        """The examples at ``index`` (any shape) as they are, ``(*index, *x)``."""
        return self.inputs.index_select(0, index.flatten()).view(*index.shape, *self.shape)

    @staticmethod
    def from_tensors(
        inputs: Tensor | np.ndarray[Any, Any],
        labels: Tensor | Sequence[int],
        name: str = "tensors",
        split: str = "all",
    ) -> ClassExamples:
        """Wrap ``(N, *x)`` inputs and N integer labels.

        Floats keep their type, and integers become int64, as ``nn.Embedding`` expects. The
        classes are named by their labels.

        Raises:
            InputError: numbers or shapes that do not match, or inputs that are neither floats nor
                integers.
        """
        try:
            found = _plain(inputs)
        except ValueError as error:
            raise InputError(f"ClassExamples '{name}': {error}") from error
        order, fields = by_label(labels, name, len(found))
        return ClassExamples(**fields, split=split, inputs=found[order])

    @staticmethod
    def from_pairs(dataset: Any, name: str | None = None) -> ClassExamples:
        """Read a map-style data set of ``(example, label)`` pairs into memory.

        Examples are converted as by `as_input`.

        Raises:
            InputError: not a map-style data set, an example that cannot be read (the message names
                the item), examples of different shapes or types, or examples that differ from one
                reading to the next.
        """
        name = name or type(dataset).__name__
        inputs, labels = read_pairs(dataset, name, as_input)
        return ClassExamples.from_tensors(inputs, labels, name)


@dataclass(frozen=True)
class ClassItems(Classes):
    """The classes of one split of a map-style data set, whose items are read whenever they are drawn.

    For data sets that do not fit into memory, and those with their own random transforms:
    `gametalearn.EpisodeSampler` reads each task under a seed derived from its own, so it reproduces
    torchvision's transforms, and others that draw from torch, NumPy or `random`.

    Attributes:
        dataset: ``dataset[i]`` is a pair ``(example, label)``.
        order: ``(N,)`` int64, the item of each example, grouped by class.
        name, split, first, count, classes, class_group, groups: as in
            `gametalearn.classes.Classes`.
    """

    dataset: Any
    order: Tensor

    __repr__ = one_line

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first example, which is read once; the others must have it, too."""
        with seeded(0):
            return tuple(self.take(self.first[:1]).shape[1:])

    def take(self, index: Tensor) -> Tensor:
        """The examples at ``index`` (any shape, not empty), read now, ``(*index, *x)``.

        Raises:
            InputError: an example that is not an input (see `as_input`), or examples that differ in
                shape.
        """
        numbers = self.order[index.flatten()].tolist()
        read = [
            read_item(self.dataset[n][0], f"item {n} of {self.name}", as_input) for n in numbers
        ]
        return stacked(read, self.name).view(*index.shape, *read[0].shape)

    @staticmethod
    def from_pairs(
        dataset: Any, labels: Tensor | Sequence[int] | None = None, name: str | None = None
    ) -> ClassItems:
        """The items of a map-style data set of ``(example, label)`` pairs, grouped by class.

        Args:
            dataset: examples are converted as by `as_input` when they are read.
            labels: N integers, such as ``dataset.targets`` in torchvision; if they are
                not given, each item is read once to learn its label.
            name: for messages; the type of ``dataset`` by default.

        Raises:
            InputError: not a map-style data set, or labels that do not match.
        """
        name = name or type(dataset).__name__
        if labels is None:
            with seeded(0):
                labels = [label for _, label in pairs_of(dataset, name, lambda item: None)]
        order, fields = by_label(labels, name, len(dataset))
        return ClassItems(**fields, split="all", dataset=dataset, order=order)


def as_input(item: Any) -> Tensor:
    """One example as the model receives it.

    Args:
        item: an 8-bit image (a Pillow image, or an array or a tensor of uint8, uint16 or bool with
            two dimensions or more; see `gametalearn.pixels.to_uint8`), which becomes float32 in [0, 1],
            ``(C, H, W)``; floats, which stay as they are; or integers, which become int64.

    Raises:
        ValueError: it is none of these, or an array that looks like an image with channels last.

    >>> as_input([3, 1, 4]), as_input(np.float16([0.5]))
    (tensor([3, 1, 4]), tensor([0.5000], dtype=torch.float16))
    """
    return to_uint8(item).float() / 255 if _is_8_bit(item) else _plain(item, one=True)


def labelled(dataset: Any, name: str | None = None) -> Classes:
    """A data set in the form that episodes are sampled from; see `gametalearn.EpisodeSampler`.

    Raises:
        InputError: as `ClassImages.from_pairs` and `ClassExamples.from_tensors`.
    """
    if isinstance(dataset, Classes):
        return dataset
    if _is_pair(dataset):
        inputs, labels = dataset
        if not _is_8_bit(inputs, more=1):
            return ClassExamples.from_tensors(inputs, labels, name or "tensors")
        by_label(labels, name or "tensors", len(inputs))  # zip would not notice a mismatch
        return ClassImages.from_pairs(list(zip(inputs, labels, strict=True)), name or "tensors")
    name = name or type(dataset).__name__
    of_8_bits, _ = next(pairs_of(dataset, name, _is_8_bit), (False, 0))
    kind = ClassImages if of_8_bits else ClassExamples
    return kind.from_pairs(dataset, name)


def read_tasks(
    data: Classes, transform: Callable[[Tensor], Any] | None, numbers: Tensor, seeds: Tensor
) -> Tensor:
    """The examples of tasks, each task under its own seed.

    Args:
        data: the examples.
        transform: applied to each of them, or None.
        numbers: ``(T, n)``, the examples' indices for T tasks.
        seeds: ``(T,)`` int64, not negative, for the global generators of torch, NumPy and `random`,
            whose states are restored afterwards.

    Returns:
        ``(T, n, *x)``.

    Raises:
        InputError: the examples differ in shape or type, or cannot be a model's inputs.
    """
    if not len(numbers):  # a process without a share
        one = read_tasks(data, transform, data.first[:1].unsqueeze(0), torch.tensor([0]))
        return one.new_empty(*numbers.shape, *one.shape[2:])
    what, tasks = f"the output of `transform` on {data.name}", []
    with undisturbed():
        for own, seed in zip(numbers, seeds.tolist(), strict=True):
            start_from(seed)
            x = data.take(own)
            if transform is not None:
                x = stacked([read_item(made, what, as_input) for made in map(transform, x)], what)
            tasks.append(x)
    return stacked(tasks, what if transform else data.name)


def _is_pair(dataset: Any) -> bool:
    """Whether this is a pair of all inputs and all labels, rather than two examples."""
    return (
        isinstance(dataset, tuple | list)
        and len(dataset) == 2
        and isinstance(dataset[0], Tensor | np.ndarray)
    )


def _is_8_bit(item: Any, more: int = 0) -> bool:
    """Whether this is an 8-bit image (of 16 bits, the upper 8 are used), or several of them."""
    if hasattr(item, "convert") and hasattr(item, "mode"):  # Pillow's, without importing it
        return True
    dtype = str(getattr(item, "dtype", "")).removeprefix("torch.")
    return dtype in EIGHT_BIT and len(item.shape) >= 2 + more


def _plain(inputs: Any, one: bool = False) -> Tensor:
    """Floats as they are, integers as int64; ``(N, *x)``, or a single example."""
    if isinstance(inputs, Tensor):
        found = inputs.detach().cpu()
    else:
        array = np.asarray(inputs)
        shape = array.shape if one else array.shape[1:]
        if len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] > 4:
            raise ValueError(
                f"an array of shape {shape} looks like an image with channels last; pass it as a "
                "tensor, in the shape that the model takes"
            )
        try:
            found = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        except TypeError as error:
            raise ValueError(f"inputs must be floats or integers ({summary(error)})") from error
    if found.is_floating_point():
        return found
    if found.dtype == torch.bool or found.is_complex() or found.is_quantized:
        kind = str(found.dtype).removeprefix("torch.")
        raise ValueError(f"inputs must be floats or integers, got {kind}; convert them")
    if found.dtype == torch.uint64 and bool((found.view(torch.int64) < 0).any()):
        raise ValueError("inputs from 2**63 on are too large for int64; convert them")
    return found.long()
