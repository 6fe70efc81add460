"""What models return: a tensor, or tensors in tuples, lists, dictionaries and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["mapped"]


def mapped(function: Callable[..., Any], *predictions: Any) -> Any:
    """``function`` of the tensors at each place of predictions that are made alike.

    Args:
        function: takes one tensor of each prediction.
        predictions: one or more. What is neither a tensor nor a container is taken from the first.

    >>> import torch
    >>> one, two = ({"a": (torch.ones(1), "text")} for _ in range(2))
    >>> mapped(torch.add, one, two)
    {'a': (tensor([2.]), 'text')}
    """

    def leaf(*values: Any) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return function(*values)
        if not dataclasses.is_dataclass(first) or isinstance(first, type):
            return first
        result = copy.copy(first)
        for field in dataclasses.fields(first):
            parts = (getattr(value, field.name) for value in values)
            object.__setattr__(result, field.name, mapped(function, *parts))
        return result

    return tree_map(leaf, *predictions)
