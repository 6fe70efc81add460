"""What was taken down of a computation, and whether it is still so.

The walk fills these records; in each call all of them are asked for what has changed, so that they do
no more than compare. Objects are held weakly: a record keeps nothing alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ABSENT",
    "Digest",
    "Entries",
    "ModuleRecord",
    "NamesRecord",
    "ObjectRecord",
    "Plain",
    "Record",
    "Same",
    "Watch",
    "entries_of",
    "form_of",
    "plain_key",
    "token_of",
    "tokens_of",
    "weakly",
]


class Absent:
    """Stands for an attribute or entry that is not there."""


ABSENT = Absent()
_PLAIN = (type(None), bool, int, str, bytes, type(Ellipsis), type(NotImplemented))
_TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class Same:
    """Equal to itself alone, even when a later object has the address of this one."""

    __slots__ = ("id", "value")

    def __init__(self, value: object) -> None:
        self.id, self.value = id(value), weakly(value)

    def __hash__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value() is self.value() is not None

    def matches(self, now: object) -> bool:
        return self.value() is now


class Plain:
    """A number, a string or the like, equal to those of its type and value."""

    __slots__ = ("key", "value")

    def __init__(self, value: object) -> None:
        self.value, self.key = value, plain_key(value)

    def matches(self, now: object) -> bool:
        return now is self.value or (type(now) is type(self.value) and plain_key(now) == self.key)


def plain_key(value: Any) -> Hashable | None:
    """The key of a plain value, None of any other."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value  # 6, 6.0 and True are not the same
    if kind in (float, complex):
        return kind, repr(value)  # nor are 0.0 and -0.0, but nan and nan are
    if kind in _TORCH_PLAIN:
        return value  # type: ignore[no-any-return]
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    return None


def token_of(value: object) -> Same | Plain:
    return Same(value) if plain_key(value) is None else Plain(value)


Tokens = tuple[tuple[Any, Same | Plain], ...]
"""Names, and what stood under them."""


def tokens_of(entries: Mapping[Any, Any]) -> Tokens:
    return tuple((name, token_of(value)) for name, value in entries.items())


def entries_of(own: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What stands under some names."""
    return {name: own.get(name, ABSENT) for name in names}


def weakly(value: Any, read: Callable[[Any], Any] | None = None) -> Callable[[], Any]:
    """A function that reads something of an object, or gives the object; None once that is gone."""
    try:
        known: Callable[[], Any] = weakref.ref(value)
    except TypeError:  # kept alive instead
        known = lambda: value  # noqa: E731
    if read is None:
        return known

    def now() -> Any:
        live = known()
        return None if live is None else read(live)

    return now


@dataclass(frozen=True)
class Entries:
    """Some entries of a holder, such as an object's attributes, as they were.

    Attributes:
        what: its name in messages.
        read: the entries now, as a mapping; None if the holder is gone.
        expected: for each name what stood there.
        size: the number of all entries, where none may come, go or change its place.
    """

    what: str
    read: Callable[[], Mapping[Any, Any] | None]
    expected: Tokens
    size: int | None = None

    def changed(self) -> str | None:
        """The name of what is no longer as it was."""
        now = self.read()
        if now is None:
            return self.what
        if self.size is not None and (
            len(now) != self.size
            or any(k is not n and k != n for k, (n, _) in zip(now, self.expected, strict=True))
        ):
            return self.what
        return _first_other(now, self.expected, self.what)


def _first_other(now: Mapping[Any, Any], expected: Tokens, what: str) -> str | None:
    for name, token in expected:
        value = now.get(name, ABSENT)
        if value is not token.value and not token.matches(value):
            return f"{what}.{name}" if isinstance(name, str) else f"{what}[{name!r}]"
    return None


@dataclass(frozen=True)
class ObjectRecord:
    """An object or a class as it was: its class, and its attributes.

    Attributes:
        what: its name in messages.
        known: the object, if it still exists.
        kind: its class.
        names: of all its attributes.
        entries: some of them.
    """

    what: str
    known: Callable[[], Any]
    kind: type
    names: frozenset[str]
    entries: Tokens

    def changed(self) -> str | None:
        """The name of what is no longer as it was."""
        value = self.known()
        if value is None or type(value) is not self.kind:
            return self.what
        own = value.__dict__
        return self.what if own.keys() != self.names else self.changed_in(own)

    def changed_in(self, own: Mapping[str, Any]) -> str | None:
        """The same, where the names of all attributes are what they were."""
        return _first_other(own, self.entries, self.what)


@dataclass(frozen=True)
class ModuleRecord(ObjectRecord):
    """A module of a network as it was; ``entries`` are without what is recorded here.

    Attributes:
        hooks: how many there were of each kind (those there are have checks of their own).
        tensors: the name, identity and form of each of its parameters and buffers.
        children: its modules.
    """

    hooks: tuple[tuple[str, int], ...]
    tensors: tuple[tuple[str, tuple[tuple[str, Same | None, Hashable], ...]], ...]
    children: Tokens

    def changed_in(self, own: Mapping[str, Any]) -> str | None:
        """The same, where the names of all attributes are what they were."""
        for group, count in self.hooks:
            if len(own[group]) != count:
                return f"{self.what}.{group}"
        for group, expected in self.tensors:
            if len(own[group]) != len(expected):
                return f"{self.what}.{group}"
            for name, tensor, form in expected:
                if not _same_tensor(own[group].get(name, ABSENT), tensor, form):
                    return f"{self.what}.{name}"
        modules = own["_modules"]
        if [*modules] != [name for name, _ in self.children]:
            return self.what
        return super().changed_in(own) or _first_other(modules, self.children, self.what)


def _same_tensor(now: Any, tensor: Same | None, form: Hashable) -> bool:
    if tensor is None:
        return now is None
    return now is not None and tensor.matches(now) and form_of(now) == form


@dataclass(frozen=True)
class Digest:
    """Something of which a digest tells whether it is as it was."""

    what: str
    digest: Callable[[], Hashable]
    expected: Hashable

    def changed(self) -> str | None:
        return None if self.digest() == self.expected else self.what


@dataclass(frozen=True)
class NamesRecord:
    """The names in a Python module: none that matters may have been added.

    Attributes:
        what: its name.
        known: the module, if it still exists.
        names: those that matter; None if all do.
        there: those that there were.
    """

    what: str
    known: Callable[[], Any]
    names: frozenset[str] | None
    there: frozenset[str]

    def changed(self) -> str | None:
        """The name of what was added."""
        value = self.known()
        if value is None:
            return self.what
        added = vars(value).keys() - self.there
        added = added if self.names is None else added & self.names
        return f"{self.what}.{min(added)}" if added else None


Record = Entries | ObjectRecord | NamesRecord | Digest


@dataclass(frozen=True)
class Watch:
    """What a computation depends on, as it was.

    Attributes:
        key: equal for computations that are the same.
        checks: what is looked at to tell whether anything has changed.
    """

    key: Hashable
    checks: tuple[Record, ...]

    def changed(self) -> str | None:
        """The name of something that is no longer as it was; None if all is."""
        for check in self.checks:
            if (name := check.changed()) is not None:
                return name
        return None


def form_of(t: Tensor | None) -> Hashable:
    return None if t is None else (t.shape, t.dtype, t.requires_grad)
