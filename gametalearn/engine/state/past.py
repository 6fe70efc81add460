"""How things were before a forward ran, and how they are put back."""

from __future__ import annotations

import collections
import contextvars
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gametalearn.engine.state.records import ABSENT

__all__ = [
    "Past",
    "kept_array",
    "kept_attributes",
    "kept_bytes",
    "kept_cache",
    "kept_cell",
    "kept_class",
    "kept_dict",
    "kept_entries",
    "kept_items",
    "kept_names",
    "kept_set",
    "kept_slots",
    "kept_variable",
]

PutBack = Callable[[], None]


class Past:
    """How things were."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._put_back: list[PutBack] = []

    def keep(self, put_back: PutBack) -> None:
        """Let `restore` call a function that puts something back."""
        self._put_back.append(put_back)

    def keep_tensors(self) -> None:
        """Let `restore` put back the numbers of tensors too; takes a copy of them."""
        copies = [(t, t.detach().clone()) for t in self.tensors if t.layout == torch.strided]

        def put_back() -> None:
            for tensor, copy in copies:
                if not torch.equal(tensor.detach(), copy):
                    tensor.data.copy_(copy)

        self.keep(put_back)

    def restore(self) -> None:
        """Put back what was changed since."""
        for put_back in self._put_back:
            put_back()


# Each of these takes down a holder's contents, and gives a function that puts them back.


def kept_dict(value: dict[Any, Any]) -> PutBack:
    before = dict(value)

    def put_back() -> None:
        if len(value) != len(before) or any(
            value.get(k, ABSENT) is not v for k, v in before.items()
        ):
            dict.clear(value)
            dict.update(value, before)

    return put_back


def kept_set(value: set[Any]) -> PutBack:
    before = list(value)

    def put_back() -> None:
        set.clear(value)
        set.update(value, before)

    return put_back


def kept_items(value: list[Any] | collections.deque[Any]) -> PutBack:
    before = list(value)

    def put_back() -> None:
        same = len(value) == len(before)
        if not (same and all(a is b for a, b in zip(value, before, strict=True))):
            value.clear()
            value.extend(before)

    return put_back


def kept_array(value: np.ndarray[Any, Any]) -> PutBack:
    before = value.copy()

    def put_back() -> None:
        if value.flags.writeable and value.tobytes() != before.tobytes():
            value[...] = before

    return put_back


def kept_bytes(value: Any) -> PutBack:
    before = bytes(value)

    def put_back() -> None:
        if bytes(value) != before:
            memoryview(value).cast("B")[:] = before

    return put_back


def kept_slots(value: object, before: Mapping[str, Any]) -> PutBack:
    def put_back() -> None:
        for name, was in before.items():
            if getattr(value, name, ABSENT) is not was and was is not ABSENT:
                object.__setattr__(value, name, was)

    return put_back


def kept_attributes(own: dict[str, Any], apart: Iterable[str]) -> PutBack:
    """Of all attributes but some."""
    before = {name: value for name, value in own.items() if name not in apart}

    def put_back() -> None:
        for name in own.keys() - before.keys() - {*apart}:
            del own[name]
        own.update(before)

    return put_back


def kept_names(own: dict[str, Any]) -> PutBack:
    """Of the names alone: those that come are taken away."""
    before = set(own)

    def put_back() -> None:
        for name in own.keys() - before:
            del own[name]

    return put_back


def kept_entries(own: dict[str, Any], before: Mapping[str, Any]) -> PutBack:
    """Of those of ``before``."""

    def put_back() -> None:
        for name, value in before.items():
            if value is ABSENT:
                own.pop(name, None)
            elif own.get(name, ABSENT) is not value:
                own[name] = value

    return put_back


def kept_class(value: type, before: Mapping[str, Any]) -> PutBack:
    """Of a class's names, and of what stands under those of ``before``."""
    own, names = vars(value), set(vars(value))

    def put_back() -> None:
        for name in own.keys() - names:
            delattr(value, name)
        for name, was in before.items():
            if own.get(name) is not was:
                setattr(value, name, was)

    return put_back


def kept_cell(cell: types.CellType, before: Any) -> PutBack:
    def put_back() -> None:
        if before is not ABSENT and cell.cell_contents is not before:
            cell.cell_contents = before

    return put_back


def kept_cache(value: functools._lru_cache_wrapper[Any]) -> PutBack:
    before = value.cache_info().misses

    def put_back() -> None:  # what was cached meanwhile may be a tracer's tensor
        if value.cache_info().misses != before:
            value.cache_clear()

    return put_back


def kept_variable(value: contextvars.ContextVar[Any]) -> PutBack:
    before = value.get(ABSENT)

    def put_back() -> None:
        if before is not ABSENT and value.get(ABSENT) is not before:
            value.set(before)

    return put_back
