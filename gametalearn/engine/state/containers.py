"""Of containers: lists, dictionaries, sets, arrays and raw memory."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from gametalearn.engine.state.objects import of_instance
from gametalearn.engine.state.past import kept_array, kept_bytes, kept_dict, kept_items, kept_set
from gametalearn.engine.state.records import Digest, Same, plain_key
from gametalearn.engine.state.walk import Walk

__all__ = [
    "of_array",
    "of_bytes",
    "of_dict",
    "of_list",
    "of_proxy",
    "of_set",
    "of_tuple",
    "of_view",
]


def of_dict(walk: Walk, value: dict[Any, Any], what: str) -> Hashable:
    what = what or type(value).__name__
    walk.past.keep(kept_dict(value))
    key = walk.hold(what, lambda: value, dict(value), len(value))
    if isinstance(value, collections.defaultdict):
        key = key, walk.of(value.default_factory, what)
    return _with_kind(walk, value, key, what)


def of_set(walk: Walk, value: set[Any] | frozenset[Any], what: str) -> Hashable:
    what, members = what or type(value).__name__, list(value)
    key = frozenset(walk.of(m, what) for m in members)
    walk.count(len(members), what)
    if isinstance(value, set):
        walk.past.keep(kept_set(value))
        expected = frozenset(map(_member, members))
        walk.checks.append(Digest(what, lambda: frozenset(map(_member, value)), expected))
    return _with_kind(walk, value, key, what)


def _member(value: object) -> Hashable:
    plain = plain_key(value)
    return Same(value) if plain is None else plain


def of_tuple(walk: Walk, value: tuple[Any, ...], what: str) -> Hashable:
    what = what or type(value).__name__
    key = tuple(walk.of(v, f"{what}[{i}]") for i, v in enumerate(value))
    walk.count(len(key), what)
    return _with_kind(walk, value, key, what)


def of_list(walk: Walk, value: list[Any] | collections.deque[Any], what: str) -> Hashable:
    what = what or type(value).__name__
    walk.past.keep(kept_items(value))
    found = dict(enumerate(value))
    key = walk.hold(what, lambda: dict(enumerate(value)), found, len(found))
    return _with_kind(walk, value, key, what)


def _with_kind(walk: Walk, value: Any, key: Hashable, what: str) -> Hashable:
    """The key of a container's entries, and of its class or, where that is a user's, of the object."""
    if type(value).__module__ in ("builtins", "collections", "torch"):
        return type(value), key
    return key, of_instance(walk, value, what)


def of_array(walk: Walk, value: np.ndarray[Any, Any], what: str) -> Hashable:
    if value.dtype == object:
        found = dict(enumerate(value.ravel().tolist()))
        key = walk.hold(what, lambda: dict(enumerate(value.ravel().tolist())), found, len(found))
        return type(value), value.shape, key
    walk.count_bytes(value.nbytes, what)
    walk.past.keep(kept_array(value))
    return type(value), walk.digest(value, _numbers, what)


def _numbers(value: np.ndarray[Any, Any]) -> Hashable:
    return value.dtype.str, value.shape, value.tobytes()


def of_bytes(walk: Walk, value: Any, what: str) -> Hashable:
    """Of a bytearray, an `array.array` or a value of `ctypes`."""
    walk.past.keep(kept_bytes(value))
    return type(value), walk.digest(value, bytes, what)


def of_proxy(walk: Walk, value: Mapping[Any, Any], what: str) -> Hashable:
    """Of a view of a dictionary that cannot be written to."""
    found = dict(value)
    return type(value), walk.hold(what, lambda: value, found, len(found))


def of_view(walk: Walk, value: Iterable[Any], what: str) -> Hashable:
    """Of a dictionary's keys, values or items."""
    found = dict(enumerate(value))
    if any(isinstance(v, tuple) for v in found.values()):  # items: made anew each time
        return type(value), walk.of(value.mapping, what)  # type: ignore[attr-defined]
    return type(value), walk.hold(what, lambda: dict(enumerate(value)), found, len(found))
