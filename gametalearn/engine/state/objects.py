"""Of objects of any class, and of what stands for another: builtin methods, weak references, variables."""

from __future__ import annotations

import abc
import contextvars
import enum
import types
import typing
import weakref
from collections.abc import Hashable, Mapping
from typing import Any, NoReturn

from gametalearn.engine.errors import UnreplayableError
from gametalearn.engine.state.classes import names_of_class
from gametalearn.engine.state.code import COMPUTED, is_library_class
from gametalearn.engine.state.past import kept_dict, kept_slots, kept_variable
from gametalearn.engine.state.records import (
    ABSENT,
    Digest,
    Same,
    entries_of,
    token_of,
    weakly,
)
from gametalearn.engine.state.walk import Walk

__all__ = [
    "of_builtin",
    "of_instance",
    "of_reference",
    "of_text",
    "of_variable",
    "of_weak_proxy",
    "refuse",
]

_BARE = (object, abc.ABC, typing.Generic, typing.Protocol)
_VALUES = (bool, int, float, complex, str, bytes)


def of_instance(walk: Walk, value: Any, what: str) -> Hashable:
    """Of any object: what it and its class have under the names that matter."""
    kind = type(value)
    what = what or kind.__name__
    iterator = getattr(kind, "__next__", None)
    if iterator is not None and not isinstance(iterator, types.FunctionType):
        refuse(walk, value, what)
    key: list[Hashable] = [walk.of(kind, "")]
    if isinstance(value, enum.Enum):
        key += [value._name_, walk.of(value._value_, what)]
    elif isinstance(value, _VALUES):  # of a class derived from it
        base = next(b for b in kind.__mro__ if b in _VALUES)
        key.append(base.__repr__(value))
    if not hasattr(value, "__dict__"):
        if is_library_class(kind) and _has_a_hash(kind):
            return kind, repr(value)  # a date, a path or a fraction: a value that never changes
    else:
        walk.past.keep(kept_dict(vars(value)))
        key.append(walk.attributes(value, _attributes(walk, value), what))
    slots = _slots(kind)
    if slots:
        before = _in_slots(value, slots)
        walk.past.keep(kept_slots(value, before))
        key.append(walk.hold(what, weakly(value, lambda now: _in_slots(now, slots)), before))
    if len(key) == 1:
        key.append(Same(value))  # of a C extension: known by its identity alone
    return tuple(key)


def _attributes(walk: Walk, value: Any) -> dict[str, Any]:
    """The attributes of an object's own that matter, and which of those of its class it lacks."""
    kind, own = type(value), vars(value)
    libraries = any(is_library_class(base) for base in kind.__mro__ if base not in _BARE)
    if libraries and not isinstance(value, enum.Enum):  # what their code reads cannot be told
        return entries_of(own, sorted(own))
    lacking = walk.relevant(names_of_class(kind) - own.keys())
    return entries_of(own, [*walk.relevant(own), *lacking])


def _slots(kind: type) -> list[str]:
    return [
        name
        for part in kind.__mro__
        for name, value in vars(part).items()
        if isinstance(value, types.MemberDescriptorType)
    ]


def _in_slots(value: object, slots: list[str]) -> Mapping[str, Any]:
    return {name: getattr(value, name, ABSENT) for name in slots}


def _has_a_hash(kind: type) -> bool:
    """Whether its objects can be hashed otherwise than every object can."""
    return any("__hash__" in vars(part) for part in kind.__mro__ if part is not object)


def refuse(walk: Walk, value: object, what: str) -> NoReturn:
    """Of what goes on from call to call without a trace in Python."""
    name = type(value).__name__
    raise UnreplayableError(f"{what or 'it'} is a {name}, which goes on by itself")


def of_builtin(walk: Walk, value: Any, what: str) -> Hashable:
    """Of what is known by its identity; a method of a builtin object by that object."""
    walk.computed |= getattr(value, "__name__", None) in COMPUTED
    owner = getattr(value, "__self__", None)
    if isinstance(value, types.BuiltinFunctionType) and not isinstance(
        owner, types.ModuleType | type | None
    ):
        return "bound", value.__name__, walk.of(owner, what)
    return Same(value)


def of_weak_proxy(walk: Walk, value: Any, what: str) -> Hashable:
    return "proxy", walk.of(value.__repr__.__self__, what)


def of_reference(walk: Walk, value: weakref.ref[Any], what: str) -> Hashable:
    walk.checks.append(Digest(what, lambda: id(value()), id(value())))
    return "reference", walk.of(value(), what)


def of_variable(walk: Walk, value: contextvars.ContextVar[Any], what: str) -> Hashable:
    walk.past.keep(kept_variable(value))
    token = token_of(value.get(None))
    walk.checks.append(Digest(what, lambda: token.matches(value.get(None)), True))
    return "variable", walk.of(value.get(None), what)


def of_text(walk: Walk, value: object, what: str) -> Hashable:
    """Of a range or a slice, which its text tells all about."""
    return type(value), repr(value)
