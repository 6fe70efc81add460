"""The options of a rule's class: which there are, and whether values given by name fit them."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

from gametalearn.errors import InputError

__all__ = ["check_options", "options_of"]


def options_of(cls: Callable[..., object], fixed: Collection[str] = ()) -> dict[str, Any]:
    """The names and defaults of a class's options but ``fixed``; no default is `inspect`'s empty.

    >>> from gametalearn.weighting.dwa import DynamicWeightAverage
    >>> options_of(DynamicWeightAverage, {"objectives", "within", "balance"})
    {'temperature': 2.0, 'period': 50}
    """
    # A class without a constructor of its own shows nn.Module's *args and **kwargs.
    return {
        p.name: p.default
        for p in inspect.signature(cls).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in fixed
    }


def check_options(
    rule: str, cls: Callable[..., object], options: Mapping[str, Any], fixed: Collection[str] = ()
) -> None:
    """Does the class take these options, and are their values of the types that it annotates?

    Raises:
        InputError: no such option, or a value of another type; the message names the rule.
    """
    takes = options_of(cls, fixed)
    hints = _hints(cls)
    for option, value in options.items():
        if option not in takes:
            known = f"it takes {', '.join(sorted(takes))}" if takes else "it takes none"
            raise InputError(f"rule '{rule}': no option '{option}'; {known}")
        if option in hints and not _fits(value, hints[option]):
            wanted = _wanted(hints[option])
            form = "; a list is written as [1, 2]" if "a list" in wanted else ""
            raise InputError(f"rule '{rule}': {option} must be {wanted}, got {value!r}{form}")


def _hints(cls: Callable[..., object]) -> dict[str, Any]:
    """What a class or function annotates; nothing where that cannot be read."""
    try:
        return typing.get_type_hints(
            vars(cls).get("__init__", cls) if isinstance(cls, type) else cls
        )
    except (NameError, TypeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inner)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if kind is Sequence:
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real)
        return number and not isinstance(value, bool) and math.isfinite(value)
    return not isinstance(hint, type) or isinstance(value, hint)


def _wanted(hint: Any) -> str:
    """A type in words.

    >>> _wanted(float | Sequence[float]), _wanted(Literal["adam", "sgd"])
    ('a number or a list, each a number', "'adam' or 'sgd'")
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(map(_wanted, inner))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind is Sequence:
        return f"a list, each {_wanted(inner[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", type(None): "nothing"}
    return names.get(hint, f"a {hint.__name__}")
