"""Which programs can be shared: a key for the structure of a module, and a bounded store."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["Store", "settings_key", "structure_key"]

V = TypeVar("V")
_PLAIN = (int, float, str, bool, bytes, type(None))
_TENSORS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
# Of what nn.Module keeps, these cannot change a forward's numbers when empty, as they mostly are.
_MANY = 64


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(v) for v in value)
    return isinstance(value, _PLAIN)


def _freeze(value: Any) -> Hashable:
    return tuple(_freeze(v) for v in value) if isinstance(value, tuple | list) else value


def structure_key(model: nn.Module) -> tuple[Hashable, bool]:
    """What decides a module's computation besides its tensors: classes and attributes.

    Returns:
        The key, and whether it tells all: if not (an attribute is neither a number, a string, nor
        a tuple of such), programs belong to this one object.
    """
    key: list[Hashable] = []
    complete = True
    for name, module in model.named_modules():
        attributes: list[Hashable] = []
        for attribute, value in vars(module).items():
            if attribute in _TENSORS:
                continue
            if _plain(value):
                attributes.append((attribute, _freeze(value)))
            elif value or not isinstance(value, dict | set):
                complete = False
                attributes.append((attribute, id(value)))
        tensors = [
            (n, tuple(t.shape), t.dtype, t.requires_grad)
            for group in (module._parameters, module._buffers)
            for n, t in group.items()
            if t is not None
        ]
        key.append((name, type(module), tuple(attributes), tuple(tensors)))
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
        values = dataclasses.astuple(settings)
        return (type(settings), values) if _plain(values) else None
    if isinstance(settings, nn.Module):
        key, complete = structure_key(settings)
        return key if complete and not list(settings.buffers()) else None
    return settings if callable(settings) and getattr(settings, "__code__", None) else None


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
