"""How records show themselves: in one line, tensors by their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["one_line"]

LONG = 60
"""Characters of a field's value that are shown as they are."""


def one_line(record: Any) -> str:
    """A dataclass's ``repr`` that fits on a line, whatever it holds: ``__repr__ = one_line``.

    >>> @dataclasses.dataclass
    ... class Pair:
    ...     x: Tensor
    ...     names: tuple[str, ...]
    ...     __repr__ = one_line
    >>> Pair(torch.zeros(2, 3), ("a", "b"))
    Pair(x=float32 (2, 3), names=('a', 'b'))
    """
    names = [field.name for field in dataclasses.fields(record) if field.name in vars(record)]
    shown = ", ".join(f"{name}={_shown(getattr(record, name))}" for name in names)
    return f"{type(record).__name__}({shown})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        place = f" on {value.device}" if isinstance(value, Tensor) and not value.is_cpu else ""
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{place}"
    kind = type(value).__name__
    if not isinstance(value, torch.nn.Module) and not dataclasses.is_dataclass(value):
        many = isinstance(value, Sized) and len(value) > LONG  # whose text may take long
        text = "" if many or isinstance(value, Mapping) else repr(value)
        if 0 < len(text) <= LONG and "\n" not in text:
            return text
        if isinstance(value, Sized):
            return f"{kind} of {len(value)}"
    return f"{kind}(...)"
