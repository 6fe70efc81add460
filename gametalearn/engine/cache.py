"""The programs that were made, found again by what they depend on."""

from __future__ import annotations

import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._device import DeviceContext

from gametalearn.engine.errors import UnreplayableError
from gametalearn.engine.program import Program
from gametalearn.engine.state import Watch, watch
from gametalearn.engine.task import Recipe

__all__ = ["Entry", "History", "Store", "key_of", "last_change"]

STATES, USES = 8, 8
"""Programs made for one module in different states before a state has to come twice to get one,
unless the programs were used this often each."""
_MANY = 64
_KEPT = 8
"""Watches that are kept for one module or function."""


@dataclass
class Entry:
    """What came of making a program.

    Attributes:
        program: None if it has to be looped.
        reason: why it is looped.
        calls: batches that it was used for.
        told: whether a warning has said why it is looped.
    """

    program: Program | None = None
    reason: str = ""
    calls: int = 0
    told: bool = False


class _Watches:
    """What was taken down of an object, the last one first; it dies with the object."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[object], list[Watch]]] = {}
        self.changed = ""  # what was no longer as it was, the last time that something was not

    def of(self, root: object, own: bool) -> Watch:
        """What ``root`` depends on now.

        Args:
            root: a module, a loss, a score, a learner.
            own: whether its parameters and buffers are a program's arguments.
        """
        kept = self._kept(root)
        for place, known in enumerate(kept):
            if known.changed() is None:
                kept.insert(0, kept.pop(place))
                return known
        if kept:
            self.changed = kept[0].changed() or ""
        modules = root.modules() if own and isinstance(root, nn.Module) else ()
        found, _ = watch(root, modules)
        kept.insert(0, found)
        del kept[_KEPT:]
        return found

    def _kept(self, root: object) -> list[Watch]:
        place = id(root)
        if place not in self._known:

            def forget(_: object) -> None:
                self._known.pop(place, None)

            try:
                reference = weakref.ref(root, forget)
            except TypeError:  # cannot be known to be gone: nothing is kept
                return []
            self._known[place] = reference, []
        return self._known[place][1]


_watches = _Watches()


def last_change() -> str:
    """The name of what was no longer as it was, the last time that something was not."""
    return _watches.changed


def key_of(recipe: Recipe) -> tuple[Hashable, ...]:
    """A key for what a recipe computes, its tensors apart.

    Raises:
        UnreplayableError: something that it depends on cannot be taken down.
    """
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if any(type(mode) is not DeviceContext for mode in modes):
        raise UnreplayableError("it runs within a mode that may change what functions of torch do")
    if any(_OF_ALL_MODULES):
        raise UnreplayableError("hooks are registered for all modules")
    return (
        _watches.of(recipe.model, own=True).key,
        _plain_settings(recipe.learner) or _watches.of(recipe.learner, own=False).key,
        _watches.of(recipe.loss, own=False).key,
        _watches.of(recipe.score, own=False).key,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_anomaly_enabled(),
        _patched(),
    )


_OF_ALL_MODULES = [
    getattr(nn.modules.module, name)
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
]


def _plain_settings(learner: object) -> Hashable | None:
    """The settings of one of the library's learners, which is made anew for each call."""
    if type(learner).__module__ != "gametalearn.adaptation":
        return None
    values = dataclasses.astuple(learner)  # type: ignore[call-overload]
    kind = _watches.of(type(learner), own=False).key
    return kind, tuple((type(v), repr(v)) for v in values)


_TORCH: list[tuple[Mapping[str, Any], list[str], list[Any]]] = []
"""The functions of PyTorch that layers call by themselves, as they were at first."""
for _space in (vars(torch), vars(F), vars(torch.Tensor), vars(nn.Module)):
    _names = [n for n, v in _space.items() if callable(v) and not isinstance(v, type)]
    _TORCH.append((_space, _names, [_space[n] for n in _names]))


def _patched() -> tuple[Hashable, ...]:
    """The functions of PyTorch that somebody has put others in the place of."""
    found = []
    for space, names, functions in _TORCH:
        now = list(map(space.get, names))
        if now != functions:
            found += [
                (name, id(f))
                for name, f, g in zip(names, now, functions, strict=True)
                if f is not g
            ]
    return tuple(found)


@dataclass
class History:
    """What was seen of one module.

    Attributes:
        reason: why it is always looped; empty if it is not.
        made: programs made for it, by everything but its state.
        used: batches that these were used for, likewise.
        missed: the key for which there was no program last time, likewise.
    """

    reason: str = ""
    made: dict[Hashable, int] = field(default_factory=dict)
    used: dict[Hashable, int] = field(default_factory=dict)
    missed: dict[Hashable, Hashable] = field(default_factory=dict)

    def admits(self, kind: Hashable, key: Hashable) -> bool:
        """Whether a program is to be made for ``key``, which it counts; not if states come and go.

        Args:
            kind: everything but the module's state.
            key: everything.
        """
        made = self.made.get(kind, 0)
        hardly_used = self.used.get(kind, 0) < USES * made
        if made >= STATES and hardly_used and self.missed.get(kind) != key:
            self.missed[kind] = key
            return False
        self.made[kind] = made + 1
        return True


class Store:
    """Entries by key, the least used forgotten."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self.past: weakref.WeakKeyDictionary[nn.Module, History] = weakref.WeakKeyDictionary()

    def get(self, key: Hashable) -> Entry | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, entry: Entry) -> Entry:
        self._entries[key] = entry
        while len(self._entries) > _MANY:
            self._entries.popitem(last=False)
        return entry

    def forget(self, entry: Entry) -> None:
        """Drop an entry."""
        for key in [key for key, value in self._entries.items() if value is entry]:
            del self._entries[key]

    def clear(self) -> None:
        """Forget all programs, and what was seen of modules."""
        self._entries.clear()
        self.past.clear()
