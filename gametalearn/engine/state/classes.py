"""Of classes and Python's modules: what they have under the names that matter."""

from __future__ import annotations

import enum
import types
from collections.abc import Hashable
from typing import Any

from torch import nn

from gametalearn.engine.state.code import is_library, is_library_class
from gametalearn.engine.state.past import kept_class, kept_entries, kept_names
from gametalearn.engine.state.records import NamesRecord, Same, weakly
from gametalearn.engine.state.walk import Walk

__all__ = ["names_of_class", "of_class", "of_python_module"]

_NOT_RUN = frozenset({
    "__init__", "__new__", "__init_subclass__", "__class_getitem__",
    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__", "__copy__",
    "__del__", "__dir__", "__sizeof__", "__subclasshook__", "__set_name__",
})  # fmt: skip
"""Special methods that a forward does not run by itself; `__init__` where it names the class."""


def of_class(walk: Walk, value: type, what: str) -> Hashable:
    """Of a class: what it and its bases have under the names that matter."""
    if what:  # it stands under a name, and may be called
        _follow_constructors(walk, value)
    if walk.met(value):
        return "seen", walk.number(value)
    walk.number(value)
    if is_library_class(value):
        return _of_library(walk, value)
    names = _own_names(value)
    special = (name for name in names if _is_special(name, value))
    found = {name: vars(value)[name] for name in sorted({*walk.relevant(names), *special})}
    walk.past.keep(kept_class(value, found))
    key: list[Hashable] = [Same(value), walk.attributes(value, found, value.__name__)]
    key += [walk.of(base, "") for base in value.__bases__ if base is not object]
    if not is_library_class(type(value)):
        key.append(walk.of(type(value), ""))
    if issubclass(value, enum.Enum):
        key += [walk.of(member, f"{value.__name__}.{member.name}") for member in value]
    return tuple(key)


def _of_library(walk: Walk, value: type) -> Hashable:
    """Of a class of a library: its methods, where it is a layer, as somebody may patch them."""
    key: list[Hashable] = [Same(value)]
    if issubclass(value, nn.Module):
        methods = {n: v for n, v in vars(value).items() if isinstance(v, types.FunctionType)}
        key.append(walk.hold(value.__name__, weakly(value, vars), methods))
    if value.__module__ not in ("builtins", "torch"):
        key += [walk.of(base, "") for base in value.__bases__ if base is not object]
    return tuple(key)


def _follow_constructors(walk: Walk, value: type) -> None:
    for name in ("__init__", "__new__"):
        for part in value.__mro__:
            if name in vars(part) and not is_library_class(part):
                walk.of(vars(part)[name], f"{part.__name__}.{name}")


def names_of_class(kind: type) -> set[str]:
    """The names that a class of one's own, or a base of it, has."""
    return {n for part in kind.__mro__ if not is_library_class(part) for n in _own_names(part)}


def _own_names(kind: type) -> list[str]:
    descriptors = types.MemberDescriptorType | types.GetSetDescriptorType
    return [name for name, value in vars(kind).items() if not isinstance(value, descriptors)]


def _is_special(name: str, kind: type) -> bool:
    """Whether it is a method that Python calls by itself."""
    special = name.startswith("__") and name.endswith("__")
    return special and name not in _NOT_RUN and isinstance(vars(kind)[name], types.FunctionType)


def of_python_module(walk: Walk, value: types.ModuleType, what: str) -> Hashable:
    """Of a Python module: what it has under the names that matter."""
    own = vars(value)
    if is_library(value.__name__):
        found = _of_library_module(walk, own)
    else:
        found = _of_own_module(walk, own)
        mattering = None if walk.everything else walk.names
        walk.checks.append(NamesRecord(value.__name__, weakly(value), mattering, frozenset(own)))
        walk.past.keep(kept_names(own))
    walk.past.keep(kept_entries(own, found))
    return value.__name__, walk.hold(value.__name__, lambda: own, found)


def _of_library_module(walk: Walk, own: dict[str, Any]) -> dict[str, Any]:
    """Which functions and classes stand under names that matter, and which modules further down."""
    kinds = types.FunctionType | types.ModuleType | type
    return {n: own[n] for n in _mattering(walk, own) if isinstance(own[n], kinds)}


def _of_own_module(walk: Walk, own: dict[str, Any]) -> dict[str, Any]:
    """What stands under names that matter; where all do, not other modules, which hold too much."""
    names = set(_mattering(walk, own))
    if walk.everything:
        names |= {
            n for n, v in own.items() if not (n.startswith("__") or isinstance(v, types.ModuleType))
        }
    return {name: own[name] for name in sorted(names)}


def _mattering(walk: Walk, own: dict[str, Any]) -> list[str]:
    return sorted(n for n in own if n in walk.names or n == "__getattr__")
