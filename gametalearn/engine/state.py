"""What a computation depends on besides its tensors, and whether that is still so.

A traced program holds for ever what Python decided while it was traced: numbers in attributes, in
closures and in global variables, which function a name stood for, which branch was taken. `watch`
walks over everything that the code of a module, a loss or a learner can reach by the names in its
bytecode, and takes down what it found, by value:

- attributes of modules and of other objects (in ``__dict__`` or in slots), and of their classes;
- entries of lists, dictionaries, sets, arrays and the like;
- closures, defaults and attributes of functions, and the global variables that they name, in
  functions that they call too;
- properties, partial functions, bound methods, hooks.

Functions of torch, numpy and the standard library are taken as given. A tensor that is no parameter
or buffer of the module is known by its identity: a program reads its numbers anew in each call.

What cannot be seen is said in this folder's README.
"""

from __future__ import annotations

import abc
import array
import builtins
import collections
import contextvars
import ctypes
import enum
import functools
import io
import logging
import mmap
import operator
import random
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gametalearn.engine.code import COMPUTED, is_library, is_library_class, names_of
from gametalearn.engine.errors import UnreplayableError
from gametalearn.engine.records import (
    ABSENT,
    Digest,
    Entries,
    ModuleRecord,
    Names,
    ObjectRecord,
    Record,
    Same,
    Watch,
    form_of,
    plain_key,
    token_of,
)
from gametalearn.engine.torchscript import SCRIPTED, refuse_scripted

__all__ = ["Past", "watch"]

MOST_ENTRIES = 20_000
"""Attributes and entries that are looked at in each call; a computation with more is not replayed."""
MOST_BYTES = 2**20
"""Of arrays, likewise."""


_BARE = (object, abc.ABC, typing.Generic, typing.Protocol)


_BUILTIN = (
    types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.Generator,
    logging.Logger, type(threading.Lock()), type(threading.RLock()), types.CodeType, io.IOBase,
)  # fmt: skip
"""Known by their identity."""
_UNFROZEN = (
    types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, memoryview, mmap.mmap,
    random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator,
)  # fmt: skip
"""What goes on from call to call without a trace in Python."""
_HOOKS = frozenset({
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks",
})  # fmt: skip
_CALLED = frozenset({
    "training", "forward", "backward", "setup_context", "vmap", "jvp", "apply",
    "adapt", "path", "meta_parameters", "for_test", "steps", "first_order", "update_is_row",
    "step_weights", "uses_support",
})  # fmt: skip
"""Names under which PyTorch and the engine itself look for something."""
_BOOKKEEPING = ("_flat_weights", "_flat_weight_refs")
"""Lists of a recurrent layer's own parameters, which it keeps up to date by itself."""
_REGISTERED = ("_parameters", "_buffers", "_modules")
_NOT_RUN = frozenset({
    "__init__", "__new__", "__init_subclass__", "__class_getitem__",
    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__", "__copy__",
    "__del__", "__dir__", "__sizeof__", "__subclasshook__", "__set_name__",
})  # fmt: skip
"""Special methods that a forward does not run by itself; `__init__` where it names the class."""


class Past(typing.Protocol):
    """How things were."""

    def keep_tensors(self) -> None:
        """Let `restore` put back the numbers of tensors too; takes a copy of them."""
        ...

    def restore(self) -> None:
        """Put back what was changed since."""
        ...


def watch(root: object, own: Iterable[nn.Module] = ()) -> tuple[Watch, Past]:
    """Take down what ``root`` depends on: a module, a loss, a learner.

    Args:
        root: where to begin.
        own: the modules whose parameters and buffers are a computation's arguments, so that only
            their forms matter. Any other tensor is known by its identity.

    Returns:
        What was found, and something that can put back what is changed from now on (by a trace of
        the forward, say).

    Raises:
        UnreplayableError: something cannot be taken down.
    """
    names: set[str] = set(_CALLED)
    everything, swapped = False, frozenset(map(id, own))
    try:
        while True:  # a function that is found may name attributes of what was seen before
            walk = _Walk(swapped, frozenset(names), everything)
            key = walk.of(root, "")
            if walk.found <= names and walk.computed <= everything:
                break
            names |= walk.found
            everything |= walk.computed
    except RecursionError:
        raise UnreplayableError(
            "it depends on values that refer to each other too deeply"
        ) from None
    return Watch((type(root), key), tuple(walk.checks)), walk


@dataclass
class _Walk:
    """One walk over all that can be reached from a root.

    Attributes:
        own: the ``id`` of each module whose tensors are arguments.
        names: of the attributes that matter.
        everything: whether all attributes do.
        found: names that the functions on the way mention.
        computed: whether one of them computes names.
        checks: as in `Watch`.
        seen: the number of each object met, and the object, which so keeps its address.
        tensors: those met that are no arguments.
        undo: functions that put holders back as they were.
    """

    own: frozenset[int]
    names: frozenset[str]
    everything: bool
    found: set[str] = field(default_factory=set)
    computed: bool = False
    checks: list[Record] = field(default_factory=list)
    seen: dict[int, tuple[int, object]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    entries: int = 0
    bytes: int = 0

    def keep_tensors(self) -> None:
        """Let `restore` put back the numbers of tensors too; takes a copy of them."""
        copies = [(t, t.detach().clone()) for t in self.tensors if t.layout == torch.strided]

        def put_back() -> None:
            for tensor, copy in copies:
                if not torch.equal(tensor.detach(), copy):
                    tensor.data.copy_(copy)

        self.undo.append(put_back)

    def restore(self) -> None:
        """Put back what was changed since."""
        for put_back in self.undo:
            put_back()

    def of(self, value: Any, what: str) -> Hashable:
        """The key of a value, whatever it is; ``what`` is its name in messages."""
        plain = plain_key(value)
        if plain is not None:
            return plain
        if type(value) in (weakref.ProxyType, weakref.CallableProxyType):
            return "proxy", self.of(value.__repr__.__self__, what)
        if isinstance(value, _BUILTIN):
            self.computed |= getattr(value, "__name__", None) in COMPUTED
            owner = getattr(value, "__self__", None)
            if isinstance(value, types.BuiltinFunctionType) and not isinstance(
                owner, types.ModuleType | type | None
            ):
                return "bound", value.__name__, self.of(owner, what)
            return Same(value)
        if isinstance(value, Tensor):
            return self.tensor(value, what)
        if isinstance(value, type) and what:
            self.constructors(value)
        if id(value) in self.seen:
            return "seen", self.seen[id(value)][0]
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, SCRIPTED):
            refuse_scripted()
        if isinstance(value, _UNFROZEN):
            raise UnreplayableError(
                f"{what or 'it'} is a {type(value).__name__}, which goes on by itself"
            )
        for kinds, visit in _VISITS:
            if isinstance(value, kinds):
                return visit(self, value, what)
        return self.instance(value, what)

    # Holders of entries.

    def hold(
        self,
        what: str,
        read: Callable[[], Mapping[Any, Any] | None],
        values: Mapping[Any, Any],
        size: int | None = None,
    ) -> Hashable:
        """Take down entries, and follow their values."""
        self.count(len(values), what)
        expected = tuple((name, token_of(value)) for name, value in values.items())
        self.checks.append(Entries(what, read, expected, size))
        return tuple(
            (
                name if isinstance(name, str) else self.of(name, what),
                # what `super()` needs: a class that is not called
                self.of(value, "" if name == "cell __class__" else f"{what}.{name}"),
            )
            for name, value in values.items()
        )

    def relevant(self, names: Iterable[str]) -> list[str]:
        return sorted(n for n in names if self.everything or n in self.names)

    def contents(self, value: Any, what: str) -> Hashable:
        """Of a list, a dictionary, a set or one of their kind."""
        what = what or type(value).__name__
        key: Hashable
        if isinstance(value, dict):
            before = dict(value)
            key = self.hold(what, lambda: value, before, len(before))

            def put_back() -> None:
                if len(value) != len(before) or any(
                    value.get(k, ABSENT) is not v for k, v in before.items()
                ):
                    dict.clear(value)
                    dict.update(value, before)

        elif isinstance(value, set | frozenset):
            members = list(value)
            keys = frozenset(self.of(m, what) for m in members)
            self.count(len(members), what)
            key = keys
            if isinstance(value, set):
                self.checks.append(Digest(what, lambda: frozenset(map(_token_key, value)),
                                          frozenset(map(_token_key, members))))  # fmt: skip

            def put_back() -> None:
                if isinstance(value, set):
                    set.clear(value)
                    set.update(value, members)

        else:
            items = list(value)
            numbered = dict(enumerate(items))
            if isinstance(value, tuple):
                key = tuple(self.of(v, f"{what}[{i}]") for i, v in numbered.items())
                self.count(len(items), what)
            else:
                key = self.hold(what, lambda: dict(enumerate(value)), numbered, len(items))

            def put_back() -> None:
                if isinstance(value, list | collections.deque) and not (
                    len(value) == len(items)
                    and all(a is b for a, b in zip(value, items, strict=True))
                ):
                    value.clear()
                    value.extend(items)

        self.undo.append(put_back)
        if type(value).__module__ in ("builtins", "collections", "torch"):
            if isinstance(value, collections.defaultdict):
                key = key, self.of(value.default_factory, what)
            return type(value), key
        return key, self.instance(value, what)

    def attributes(self, value: Any, names: Iterable[str], what: str) -> Hashable:
        """Of an object's own dictionary."""
        own = vars(value)
        entries = {name: own.get(name, ABSENT) for name in names}
        self.count(len(entries), what)
        before = dict(own)

        def put_back() -> None:
            if own.keys() != before.keys() or any(own[k] is not v for k, v in before.items()):
                own.clear()
                own.update(before)

        self.undo.append(put_back)
        tokens = tuple((name, token_of(v)) for name, v in entries.items())
        self.checks.append(ObjectRecord(what, _weakly(value), type(value), frozenset(own), tokens))
        return tuple((name, self.of(v, f"{what}.{name}")) for name, v in entries.items())

    def count(self, entries: int, what: str) -> None:
        self.entries += entries
        if self.entries > MOST_ENTRIES:
            raise UnreplayableError(
                f"it depends on more than {MOST_ENTRIES} values, among them those in {what}"
            )

    def instance(self, value: Any, what: str) -> Hashable:
        """Of any other object: what it and its class have under the names that matter."""
        kind = type(value)
        what = what or kind.__name__
        iterator = getattr(kind, "__next__", None)
        if iterator is not None and not isinstance(iterator, types.FunctionType):
            raise UnreplayableError(f"{what} is a {kind.__name__}, which goes on by itself")
        key: list[Hashable] = [self.of(kind, "")]
        of_library = is_library_class(kind)
        if isinstance(value, enum.Enum):
            key += [value._name_, self.of(value._value_, what)]
        elif isinstance(value, int | float | complex | str | bytes):  # of a class derived from it
            base = next(b for b in kind.__mro__ if b in (bool, int, float, complex, str, bytes))
            key.append(base.__repr__(value))
        if of_library and not hasattr(value, "__dict__") and "__hash__" in _defined(kind):
            return kind, repr(value)  # a date, a path or a fraction: a value that never changes
        if hasattr(value, "__dict__"):
            own = vars(value)
            # what code of a library reads cannot be told
            bases = [b for b in kind.__mro__ if b not in _BARE]
            everything = any(map(is_library_class, bases)) and not isinstance(value, enum.Enum)
            names = sorted(own) if everything else self.relevant(own)
            of_class = [] if everything else self.relevant(set(_class_names(kind)) - own.keys())
            key.append(self.attributes(value, [*names, *of_class], what))
        slots = [
            n
            for part in kind.__mro__
            for n, v in vars(part).items()
            if isinstance(v, types.MemberDescriptorType)
        ]
        if slots:
            known = _weakly(value)

            def read() -> Mapping[str, Any] | None:
                now = known()
                return None if now is None else {n: getattr(now, n, ABSENT) for n in slots}

            now = {n: getattr(value, n, ABSENT) for n in slots}
            key.append(self.hold(what, read, now))

            def put_back() -> None:
                for name, before in now.items():
                    if getattr(value, name, ABSENT) is not before and before is not ABSENT:
                        object.__setattr__(value, name, before)

            self.undo.append(put_back)
        if len(key) == 1 and not slots and not hasattr(value, "__dict__"):
            key.append(Same(value))  # of a C extension: known by its identity alone
        return tuple(key)

    # Modules of neural networks.

    def module(self, value: nn.Module, what: str) -> Hashable:
        kind, own = type(value), vars(value)
        what = what or kind.__name__
        names = self.relevant(n for n in own if n not in _REGISTERED and n not in _HOOKS)
        read_by_torch: frozenset[str] = _mentioned(kind)  # type: ignore[arg-type]
        kept = {*_REGISTERED, *_HOOKS, *_BOOKKEEPING}
        names = sorted({*names, *(read_by_torch & own.keys())} - kept)
        hidden = self.relevant({*_class_names(kind), "forward"} - own.keys())
        entries = {name: own.get(name, ABSENT) for name in [*names, *hidden]}
        hooks: dict[str, dict[Any, Any]] = {n: own[n] for n in sorted(_HOOKS & own.keys())}
        known, given = weakref.ref(value), id(value) in self.own
        tensors: dict[str, dict[str, Tensor | None]] = {
            g: own[g] for g in ("_parameters", "_buffers")
        }
        children = dict(own["_modules"])
        self.count(len(entries) + len(children) + sum(map(len, tensors.values())), what)
        before = {k: v for k, v in own.items() if k not in _REGISTERED}

        def put_back() -> None:
            for name in own.keys() - before.keys() - {*_REGISTERED}:
                del own[name]
            own.update(before)

        self.undo.append(put_back)
        self.checks.append(
            ModuleRecord(
                what,
                known,
                kind,
                frozenset(own),
                tuple((name, token_of(v)) for name, v in entries.items()),
                tuple((group, len(hooks[group])) for group in hooks),
                tuple(
                    (
                        group,
                        tuple((n, t if t is None else Same(t), form_of(t)) for n, t in ts.items()),
                    )
                    for group, ts in tensors.items()
                ),
                tuple((name, token_of(child)) for name, child in children.items()),
            )
        )
        key: list[Hashable] = [self.of(kind, "")]
        key += [(name, self.of(v, f"{what}.{name}")) for name, v in entries.items()]
        key += [(name, self.of(v, f"{what}.{name}")) for name, v in hooks.items() if v]
        for group in tensors.values():
            for name, t in group.items():
                # an argument is known by its form, and, where it is tied, by where it was met first
                key.append((name, form_of(t), self._number(t)) if given or t is None
                           else (name, self.tensor(t, f"{what}.{name}")))  # fmt: skip
        key += [(name, self.of(child, f"{what}.{name}")) for name, child in children.items()]
        return tuple(key)

    def _number(self, value: object) -> int | None:
        if value is None:
            return None
        return self.seen.setdefault(id(value), (len(self.seen), value))[0]

    def tensor(self, value: Tensor, what: str) -> Hashable:
        """One that is read anew in each call: its memory and form must stay."""
        known, new = _weakly(value), id(value) not in self.seen
        self._number(value)
        key: list[Hashable] = [Same(value), _place(value)]
        if not new:
            return tuple(key)
        self.tensors.append(value)

        def digest() -> Hashable:
            now = known()
            return None if now is None else _place(now)

        self.checks.append(Digest(what, digest, _place(value)))
        if type(value) is Tensor or type(value) is nn.Parameter:
            key.append(self.attributes(value, self.relevant(vars(value)), what))
            if "grad" in self.names and value.is_leaf:
                token = token_of(value.grad)
                self.checks.append(Digest(f"{what}.grad", lambda: token.matches(value.grad), True))
                key.append(self.of(value.grad, f"{what}.grad"))
        return tuple(key)

    def array(self, value: np.ndarray[Any, Any], what: str) -> Hashable:
        if value.dtype == object:
            items = dict(enumerate(value.ravel().tolist()))
            live = lambda: dict(enumerate(value.ravel().tolist()))  # noqa: E731
            return type(value), value.shape, self.hold(what, live, items, len(items))
        self.bytes += value.nbytes
        if self.bytes > MOST_BYTES:
            raise UnreplayableError(
                f"it depends on arrays of more than {MOST_BYTES} bytes, among them {what}; "
                "make them tensors"
            )
        known = _weakly(value)

        def digest() -> Hashable:
            now = known()
            return None if now is None else (now.dtype.str, now.shape, now.tobytes())

        expected, before = digest(), value.copy()

        def put_back() -> None:
            if value.flags.writeable and value.tobytes() != before.tobytes():
                value[...] = before

        self.undo.append(put_back)
        self.checks.append(Digest(what, digest, expected))
        return type(value), expected

    def raw(self, value: Any, what: str) -> Hashable:
        """Of a bytearray or an `array.array`."""
        expected = bytes(value)

        def put_back() -> None:
            if bytes(value) != expected:
                memoryview(value).cast("B")[:] = expected

        self.undo.append(put_back)
        self.checks.append(Digest(what, lambda: bytes(value), expected))
        return type(value), expected

    def getter(self, value: Any, what: str) -> Hashable:
        """Of what the module `operator` makes: it reads attributes, or calls methods, by name."""
        self.computed = True
        return type(value), tuple(self.of(part, what) for part in value.__reduce__()[1:])

    def proxy(self, value: Mapping[Any, Any], what: str) -> Hashable:
        """Of a view of a dictionary that cannot be written to."""
        found = dict(value)
        return type(value), self.hold(what, lambda: value, found, len(found))

    def view(self, value: Iterable[Any], what: str) -> Hashable:
        """Of a dictionary's keys, values or items."""
        found = dict(enumerate(value))
        if any(isinstance(v, tuple) for v in found.values()):  # items: made anew each time
            return type(value), self.of(value.mapping, what)  # type: ignore[attr-defined]
        return type(value), self.hold(what, lambda: dict(enumerate(value)), found, len(found))

    # Functions, methods and classes.

    def function(self, value: types.FunctionType, what: str) -> Hashable:
        what = what or value.__qualname__
        space = value.__globals__
        followed = not is_library(space.get("__name__"))
        known = _weakly(value)

        def parts() -> Mapping[str, Any] | None:
            now = known()
            return None if now is None else _parts(now)

        key: list[Hashable] = [value.__code__ if followed else Same(value)]
        held = _parts(value)
        cells = [name for name in held if name.startswith("cell ")]
        if followed or cells or value.__dict__:
            key.append(self.hold(what, parts, held, len(held)))
        for cell, name in zip(value.__closure__ or (), cells, strict=True):
            self.undo.append(_refill(cell, held[name]))
        before = dict(value.__dict__)

        def put_back() -> None:
            if value.__dict__ != before:
                value.__dict__.clear()
                value.__dict__.update(before)

        self.undo.append(put_back)
        if not followed:
            self.computed |= value.__name__ in COMPUTED
            return tuple(key)
        names = names_of(value.__code__)
        self.found |= names.attributes
        self.computed |= names.computed
        read = set(names.globals)
        if not read.isdisjoint({"globals", "eval", "exec"}):
            read |= {n for n in space if not n.startswith("__")}
        outer: dict[str, Any] = {n: space.get(n, ABSENT) for n in sorted(read)}
        inherited = {n: getattr(builtins, n, ABSENT) for n, v in outer.items() if v is ABSENT}
        key.append(self.hold(value.__module__ or what, lambda: space, outer))
        key.append(tuple((n, self.of(v, n)) for n, v in inherited.items()))
        self.undo.append(_put_back_globals(space, outer))
        imports = set(names.imports)
        if names.computed:  # modules that are asked for by their names
            imports |= {text for text in names.texts if text in sys.modules}
        for name in sorted(imports):
            for full in (name, f"{space.get('__package__') or ''}.{name}"):
                imported = sys.modules.get(full)
                if imported is not None:
                    key.append(self.of(imported, full))
        return tuple(key)

    def method(self, value: types.MethodType, what: str) -> Hashable:
        return "method", self.of(value.__func__, what), self.of(value.__self__, what)

    def partial(self, value: functools.partial[Any], what: str) -> Hashable:
        parts = value.func, value.args, value.keywords
        return "partial", *(self.of(p, what) for p in parts), self.of(vars(value), what)

    def wrapper(self, value: Any, what: str) -> Hashable:
        """A static method, a cached function, and what else has the function that it wraps."""
        if isinstance(value, functools._lru_cache_wrapper):
            before = value.cache_info().misses

            def put_back() -> None:  # what was cached meanwhile may be a tracer's tensor
                if value.cache_info().misses != before:
                    value.cache_clear()

            self.undo.append(put_back)
        return type(value), self.of(value.__wrapped__, what)

    def accessor(self, value: property, what: str) -> Hashable:
        return "property", *(self.of(f, what) for f in (value.fget, value.fset, value.fdel))

    def cached(self, value: functools.cached_property[Any], what: str) -> Hashable:
        return "cached property", self.of(value.func, what)

    def reference(self, value: weakref.ref[Any], what: str) -> Hashable:
        self.checks.append(Digest(what, lambda: id(value()), id(value())))
        return "reference", self.of(value(), what)

    def variable(self, value: contextvars.ContextVar[Any], what: str) -> Hashable:
        before = value.get(ABSENT)

        def put_back() -> None:
            if before is not ABSENT and value.get(ABSENT) is not before:
                value.set(before)

        self.undo.append(put_back)
        token = token_of(value.get(None))
        self.checks.append(Digest(what, lambda: token.matches(value.get(None)), True))
        return "variable", self.of(value.get(None), what)

    def space(self, value: types.ModuleType, what: str) -> Hashable:
        """Of a Python module: what it has under the names that matter."""
        own = vars(value)
        library = is_library(value.__name__)
        names = [n for n in own if n in self.names or n == "__getattr__"]
        if self.everything and not library:  # but other modules, which hold too much
            names = [
                n
                for n, v in own.items()
                if n in names or not (n.startswith("__") or isinstance(v, types.ModuleType))
            ]
        found = {n: own[n] for n in sorted(names)}
        if library:  # which function stands there, and modules further down
            found = {
                n: v
                for n, v in found.items()
                if isinstance(v, types.FunctionType | types.ModuleType | type)
            }
        else:
            before, known = dict(own), _weakly(value)
            mattering = None if self.everything else self.names
            self.checks.append(Names(value.__name__, known, mattering, frozenset(own)))

            def put_back() -> None:
                for name in own.keys() - before.keys():
                    del own[name]

            self.undo.append(put_back)
        key = self.hold(value.__name__, lambda: own, found)
        self.undo.append(_put_back_globals(own, found))
        return value.__name__, key

    def constructors(self, value: type) -> None:
        """A class that stands under a name may be called."""
        for name in ("__init__", "__new__"):
            for part in value.__mro__:
                if name in vars(part) and not is_library_class(part):
                    self.of(vars(part)[name], f"{part.__name__}.{name}")

    def kind(self, value: type, what: str) -> Hashable:
        """Of a class: what it and its bases have under the names that matter."""
        key: list[Hashable] = [Same(value)]
        own = vars(value)
        if is_library_class(value):
            # their methods, unless somebody patches them
            methods = {n: v for n, v in own.items() if isinstance(v, types.FunctionType)}
            if issubclass(value, nn.Module):
                key.append(self.hold(value.__name__, _dictionary_of(_weakly(value), None), methods))
            if value.__module__ not in ("builtins", "torch"):
                key += [self.of(base, "") for base in value.__bases__ if base is not object]
            return tuple(key)
        names = sorted(
            n
            for n in _own_names(value)
            if self.everything or n in self.names or _is_special(n, value)
        )
        found, before = {n: own[n] for n in names}, dict(own)
        tokens = tuple((n, token_of(v)) for n, v in found.items())
        self.count(len(found), value.__name__)
        self.checks.append(
            ObjectRecord(value.__name__, _weakly(value), type(value), frozenset(own), tokens)
        )
        key.append(tuple((n, self.of(v, f"{value.__name__}.{n}")) for n, v in found.items()))
        key += [self.of(base, "") for base in value.__bases__ if base is not object]
        if not is_library_class(type(value)):
            key.append(self.of(type(value), ""))
        if issubclass(value, enum.Enum):
            key += [self.of(member, f"{value.__name__}.{member.name}") for member in value]

        def put_back() -> None:
            for name in own.keys() - before.keys():
                delattr(value, name)
            for name, was in found.items():
                if own.get(name) is not was:
                    setattr(value, name, was)

        self.undo.append(put_back)
        return tuple(key)


_VISITS: tuple[tuple[Any, Callable[[_Walk, Any, str], Hashable]], ...] = (
    (nn.Module, _Walk.module),
    (types.FunctionType, _Walk.function),
    (types.MethodType, _Walk.method),
    (functools.partial, _Walk.partial),
    ((staticmethod, classmethod, functools._lru_cache_wrapper), _Walk.wrapper),
    (property, _Walk.accessor),
    (functools.cached_property, _Walk.cached),
    (types.ModuleType, _Walk.space),
    (type, _Walk.kind),
    (np.ndarray, _Walk.array),
    ((bytearray, array.array), _Walk.raw),
    ((ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union), _Walk.raw),
    ((operator.attrgetter, operator.methodcaller, operator.itemgetter), _Walk.getter),
    (types.MappingProxyType, _Walk.proxy),
    ((type({}.keys()), type({}.values()), type({}.items())), _Walk.view),
    (weakref.ref, _Walk.reference),
    (contextvars.ContextVar, _Walk.variable),
    ((list, tuple, dict, set, frozenset, collections.deque), _Walk.contents),
    ((range, slice), lambda walk, value, what: (type(value), repr(value))),
)
"""What is done with each kind of value; the first that fits."""


def _weakly(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # kept alive instead
        return lambda: value


def _token_key(value: object) -> Hashable:
    plain = plain_key(value)
    return Same(value) if plain is None else plain


def _dictionary_of(known: Callable[[], Any], name: str | None) -> Callable[[], Any]:
    """Reads the dictionary of an object that may be gone, or the one under a name in it."""

    def read() -> Any:
        now = known()
        if now is None:
            return None
        return vars(now) if name is None else vars(now)[name]

    return read


def _place(t: Tensor) -> Hashable:
    """Where a tensor's numbers lie, and in which form."""
    try:
        place = t.data_ptr()
    except RuntimeError:  # a sparse or wrapped tensor
        place = 0
    stride = t.stride() if t.layout == torch.strided else ()
    return place, t.shape, stride, t.dtype, t.device, t.requires_grad


def _parts(value: types.FunctionType) -> dict[str, Any]:
    """What a function consists of besides its globals."""
    found: dict[str, Any] = {"__code__": value.__code__, **value.__dict__}
    for name, defaults in (("default", value.__defaults__), ("default", value.__kwdefaults__)):
        items = defaults.items() if isinstance(defaults, dict) else enumerate(defaults or ())
        found |= {f"{name} {i}": v for i, v in items}
    names = value.__code__.co_freevars
    for i, cell in enumerate(value.__closure__ or ()):
        try:
            found[f"cell {names[i]}"] = cell.cell_contents
        except ValueError:  # not filled yet
            found[f"cell {names[i]}"] = ABSENT
    return found


def _refill(cell: types.CellType, before: Any) -> Callable[[], None]:
    def put_back() -> None:
        if before is not ABSENT and cell.cell_contents is not before:
            cell.cell_contents = before

    return put_back


def _put_back_globals(space: dict[str, Any], before: dict[str, Any]) -> Callable[[], None]:
    def put_back() -> None:
        for name, value in before.items():
            if value is ABSENT:
                space.pop(name, None)
            elif space.get(name, ABSENT) is not value:
                space[name] = value

    return put_back


def _defined(kind: type) -> set[str]:
    """The names that a class or a base of it has, but those that every object has."""
    return {name for part in kind.__mro__ if part is not object for name in vars(part)}


def _own_names(kind: type) -> Iterator[str]:
    for name, value in vars(kind).items():
        if not isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
            yield name


def _class_names(kind: type) -> Iterator[str]:
    """The names that a class of one's own, or a base of it, has."""
    for part in kind.__mro__:
        if not is_library_class(part):
            yield from _own_names(part)


def _is_special(name: str, kind: type) -> bool:
    """Whether it is a method that Python calls by itself."""
    special = name.startswith("__") and name.endswith("__")
    return special and name not in _NOT_RUN and isinstance(vars(kind)[name], types.FunctionType)


@functools.cache
def _mentioned(kind: type) -> frozenset[str]:
    """The attributes that the methods of torch's classes among a module's bases read."""
    return frozenset(
        name
        for part in kind.__mro__
        if issubclass(part, nn.Module) and part is not nn.Module and is_library_class(part)
        for value in vars(part).values()
        if isinstance(value, types.FunctionType)
        for name in names_of(value.__code__).attributes
    )
