"""Which programs can be shared: a key for the structure of a module, and a bounded store."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Store", "settings_key", "structure_key"]

V = TypeVar("V")
_TENSORS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_MANY = 64
_DEPTH = 4
"""How deep containers and plain objects are looked into."""


class _Same:
    """A key for one object, equal to itself alone, even when a later object has its address."""

    def __init__(self, value: object) -> None:
        self.id = id(value)
        try:
            self.value: Callable[[], object] = weakref.ref(value)
        except TypeError:  # kept alive instead
            self.value = lambda: value

    def __hash__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value() is self.value() is not None


def _freeze(value: Any, depth: int = _DEPTH) -> tuple[Hashable, bool]:
    """A key for what a value is now, and whether it tells all and holds for equal values too.

    If not, the value is known by its identity, and, as far as they can be seen, its contents.
    """
    kind = type(value)
    if value is None or kind in (int, bool, str, bytes):
        return (kind, value), True  # 6, 6.0 and True are not the same
    if kind in (float, complex):
        return (kind, repr(value)), True  # nor are 0.0 and -0.0, but nan and nan are
    if kind in (torch.dtype, torch.device, torch.layout, torch.memory_format):
        return value, True
    if isinstance(value, Tensor):
        return (_Same(value), None if value.is_inference() else value._version), False
    if isinstance(value, np.ndarray):
        return (kind, value.dtype.str, value.shape, value.tobytes()), value.dtype != object
    if depth == 0:
        return _Same(value), False
    if kind in (tuple, list, set, frozenset, torch.Size):
        keys, complete = _freeze_all(value, depth - 1)
        return (kind, frozenset(keys) if kind in (set, frozenset) else keys), complete
    if isinstance(value, dict):
        keys, complete = _freeze_all([*value, *value.values()], depth - 1)
        return (kind, keys), complete
    if isinstance(value, FunctionType):
        cells = value.__closure__ or ()
        seen = [value.__defaults__, value.__kwdefaults__, *(_content(cell) for cell in cells)]
        return (_Same(value), _freeze_all(seen, depth - 1)[0]), False
    if isinstance(value, MethodType):  # made anew each time that it is asked for
        return (_Same(value.__func__), _Same(value.__self__)), False
    if isinstance(value, SimpleNamespace | Namespace) or dataclasses.is_dataclass(kind):
        return (_Same(value), _freeze(vars(value), depth - 1)[0]), False
    return _Same(value), False


def _freeze_all(values: Iterable[Any], depth: int) -> tuple[tuple[Hashable, ...], bool]:
    frozen = [_freeze(v, depth) for v in values]
    return tuple(key for key, _ in frozen), all(complete for _, complete in frozen)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _empty(value: object) -> bool:
    return isinstance(value, dict) and not value


def _of_class(kind: type) -> dict[str, Any]:
    """Numbers and strings that stand in a class of the user's own."""
    found = {}
    for part in reversed(kind.__mro__):
        if not part.__module__.startswith(("torch.", "builtins")):
            for name, value in vars(part).items():
                if isinstance(value, int | float | str) and not name.startswith("__"):
                    found[name] = value
    return found


def structure_key(model: nn.Module) -> tuple[Hashable, bool]:
    """What decides a module's computation besides its tensors: classes and attributes.

    Returns:
        The key, and whether it tells all: if not (an attribute is neither a number, a string, nor
        made of such), programs belong to this one object.
    """
    key: list[Hashable] = []
    complete = True
    for name, module in model.named_modules():
        own = {
            **_of_class(type(module)),
            **{a: v for a, v in vars(module).items() if a not in _TENSORS and not _empty(v)},
        }
        attributes, told = _freeze_all(own.values(), _DEPTH)
        complete &= told
        tensors = [
            (n, tuple(t.shape), t.dtype, t.requires_grad)
            for group in (module._parameters, module._buffers)
            for n, t in group.items()
            if t is not None
        ]
        key.append((name, type(module), tuple(own), attributes, tuple(tensors)))
    # Tied parameters: the names under which each one is known.
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    key.append(tuple(tuple(names) for names in owners.values() if len(names) > 1))
    return tuple(key), complete


def settings_key(settings: object) -> Hashable | None:
    """A key for a learner or a loss: the value of a frozen dataclass, else the function itself.

    None if it could change unseen (a mutable object), so that nothing may be kept for it.
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        if not type(settings).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return None
        values, complete = _freeze(dataclasses.astuple(settings))
        return (type(settings), values) if complete else None
    if isinstance(settings, nn.Module):
        key, complete = structure_key(settings)
        return key if complete and not list(settings.buffers()) else None
    if isinstance(settings, FunctionType):
        return _freeze(settings)[0]
    return None


class Store(Generic[V]):
    """Values by key, the least used forgotten; keys of one module's own die with it."""

    def __init__(self) -> None:
        self.shared: OrderedDict[Hashable, V] = OrderedDict()
        self.own: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, V]] = WeakKeyDictionary()
        self.made = 0

    def get(self, model: nn.Module, key: Hashable, make: Callable[[], V]) -> V:
        """The value for ``key`` and the module's structure, made if it is not there."""
        structure, complete = structure_key(model)
        values = self.shared if complete else self.own.setdefault(model, OrderedDict())
        full = (structure, key)
        if full in values:
            values.move_to_end(full)
            return values[full]
        self.made += 1
        if self.made == 8 * _MANY:
            warnings.warn(
                f"gametalearn: {self.made} different computations were traced; pass the same loss "
                "function and learner settings from call to call, and batches of equal shapes",
                stacklevel=5,
            )
        value = values[full] = make()
        while len(values) > _MANY:
            values.popitem(last=False)
        return value
