"""Copies of modules, also of those that keep a tensor of their last forward."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copied"]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a module, its parameters and buffers ordinary tensors of its own.

    `copy.deepcopy` refuses tensors that a graph leads to: what ``nn.utils.weight_norm`` computes, or
    features that a forward keeps. In the copy they are constants, until its own forward replaces
    them.
    """
    with torch.inference_mode(False):
        memo = {id(tensor): _cut_off(tensor) for tensor in _tensors(model) if _bound(tensor)}
        return copy.deepcopy(model, memo)


def _bound(tensor: Tensor) -> bool:
    """Whether `copy.deepcopy` cannot take it, or would keep it bound to inference mode."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True  # what a trace left
    return not tensor.is_leaf or (tensor.is_inference() and plain)


def _cut_off(tensor: Tensor) -> Tensor:
    try:
        result = tensor.detach().clone()
    except RuntimeError:  # what a trace left has no values any more
        return torch.empty(0)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(result, tensor.requires_grad)
    return result


def _tensors(start: Any) -> Iterator[Tensor]:
    """The tensors in a module's attributes, and in containers and objects in them, at any depth."""
    waiting: deque[Any] = deque([start])
    seen: set[int] = set()
    kept = []  # lest a new object gets the number of one that is gone
    while waiting:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, type | FunctionType | ModuleType | str | bytes):
            continue
        seen.add(id(value))
        kept.append(value)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting.extend(value)
        elif hasattr(value, "__dict__"):
            waiting.append(vars(value))
