"""Of functions, and of what wraps them: methods, partial functions, properties, caches."""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Hashable, Iterator
from typing import Any

from gametalearn.engine.state.code import COMPUTED, Names, is_library, names_of
from gametalearn.engine.state.past import kept_cache, kept_cell, kept_dict, kept_entries
from gametalearn.engine.state.records import ABSENT, Same, entries_of, weakly
from gametalearn.engine.state.walk import Walk

__all__ = [
    "of_cached_property",
    "of_function",
    "of_getter",
    "of_method",
    "of_partial",
    "of_property",
    "of_wrapper",
]


def of_function(walk: Walk, value: types.FunctionType, what: str) -> Hashable:
    """Of a function: what it consists of, and the globals and modules that it names."""
    what = what or value.__qualname__
    space = value.__globals__
    followed = not is_library(space.get("__name__"))
    key: list[Hashable] = [value.__code__ if followed else Same(value)]
    held = _parts(value)
    if followed or value.__closure__ or value.__dict__:
        key.append(walk.hold(what, weakly(value, _parts), held, len(held)))
    for cell, name in zip(value.__closure__ or (), value.__code__.co_freevars, strict=True):
        walk.past.keep(kept_cell(cell, held[f"cell {name}"]))
    walk.past.keep(kept_dict(value.__dict__))
    if not followed:
        walk.computed |= value.__name__ in COMPUTED
        return tuple(key)
    names = names_of(value.__code__)
    walk.found |= names.attributes
    walk.computed |= names.computed
    outer = entries_of(space, _globals(names, space))
    walk.past.keep(kept_entries(space, outer))
    key.append(walk.hold(value.__module__ or what, lambda: space, outer))
    for name, found in outer.items():
        if found is ABSENT:
            key.append((name, walk.of(getattr(builtins, name, ABSENT), name)))
    for name, module in _imported(names, space):
        key.append(walk.of(module, name))
    return tuple(key)


def _parts(value: types.FunctionType) -> dict[str, Any]:
    """What a function consists of besides its globals."""
    found: dict[str, Any] = {"__code__": value.__code__, **value.__dict__}
    found |= {f"default {i}": v for i, v in enumerate(value.__defaults__ or ())}
    found |= {f"default {name}": v for name, v in (value.__kwdefaults__ or {}).items()}
    names = value.__code__.co_freevars
    for name, cell in zip(names, value.__closure__ or (), strict=True):
        try:
            found[f"cell {name}"] = cell.cell_contents
        except ValueError:  # not filled yet
            found[f"cell {name}"] = ABSENT
    return found


def _globals(names: Names, space: dict[str, Any]) -> list[str]:
    """The global variables that a function may read."""
    read = set(names.globals)
    if not read.isdisjoint({"globals", "eval", "exec"}):
        read |= {name for name in space if not name.startswith("__")}
    return sorted(read)


def _imported(names: Names, space: dict[str, Any]) -> Iterator[tuple[str, types.ModuleType]]:
    """The modules that a function imports when it runs, where they are loaded, by their names."""
    imports = set(names.imports)
    if names.computed:  # modules that are asked for by their names
        imports |= {text for text in names.texts if text in sys.modules}
    for name in sorted(imports):
        for full in (name, f"{space.get('__package__') or ''}.{name}"):
            module = sys.modules.get(full)
            if module is not None:
                yield full, module


def of_method(walk: Walk, value: types.MethodType, what: str) -> Hashable:
    return "method", walk.of(value.__func__, what), walk.of(value.__self__, what)


def of_partial(walk: Walk, value: functools.partial[Any], what: str) -> Hashable:
    parts = value.func, value.args, value.keywords, vars(value)
    return "partial", *(walk.of(part, what) for part in parts)


def of_wrapper(walk: Walk, value: Any, what: str) -> Hashable:
    """Of a static method, a class method or a cached function."""
    if isinstance(value, functools._lru_cache_wrapper):
        walk.past.keep(kept_cache(value))
    return type(value), walk.of(value.__wrapped__, what)


def of_property(walk: Walk, value: property, what: str) -> Hashable:
    return "property", *(walk.of(f, what) for f in (value.fget, value.fset, value.fdel))


def of_cached_property(walk: Walk, value: functools.cached_property[Any], what: str) -> Hashable:
    return "cached property", walk.of(value.func, what)


def of_getter(walk: Walk, value: Any, what: str) -> Hashable:
    """Of what the module `operator` makes: it reads attributes, or calls methods, by name."""
    walk.computed = True
    return type(value), tuple(walk.of(part, what) for part in value.__reduce__()[1:])
