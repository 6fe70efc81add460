"""Of the modules of a network, and of tensors."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from gametalearn.engine.state.classes import names_of_class
from gametalearn.engine.state.code import is_library_class, names_of
from gametalearn.engine.state.past import kept_attributes, kept_dict
from gametalearn.engine.state.records import (
    Digest,
    ModuleRecord,
    Same,
    entries_of,
    form_of,
    token_of,
    tokens_of,
    weakly,
)
from gametalearn.engine.state.walk import Walk

__all__ = ["of_module", "of_tensor"]

_HOOKS = frozenset({
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks",
})  # fmt: skip
_BOOKKEEPING = ("_flat_weights", "_flat_weight_refs")
"""Lists of a recurrent layer's own parameters, which it keeps up to date by itself."""
_REGISTERED = ("_parameters", "_buffers", "_modules")


def of_module(walk: Walk, value: nn.Module, what: str) -> Hashable:
    kind, own = type(value), vars(value)
    what = what or kind.__name__
    entries = entries_of(own, _attributes(walk, value))
    hooks = {name: own[name] for name in sorted(_HOOKS & own.keys())}
    tensors = {group: dict(own[group]) for group in _REGISTERED[:2]}
    children = dict(own["_modules"])
    walk.count(len(entries) + len(children) + sum(map(len, tensors.values())), what)
    walk.past.keep(kept_attributes(own, _REGISTERED))
    walk.checks.append(
        ModuleRecord(
            what,
            weakly(value),
            kind,
            frozenset(own),
            tokens_of(entries),
            tuple((group, len(found)) for group, found in hooks.items()),
            tuple((group, _forms(found)) for group, found in tensors.items()),
            tokens_of(children),
        )
    )
    key: list[Hashable] = [walk.of(kind, ""), walk.follow(entries, what)]
    key.append(walk.follow({name: found for name, found in hooks.items() if found}, what))
    for group in tensors.values():
        key += [
            (name, _of_registered(walk, value, t, f"{what}.{name}")) for name, t in group.items()
        ]
    key.append(walk.follow(children, what))
    return tuple(key)


def _attributes(walk: Walk, value: nn.Module) -> list[str]:
    """The names of the attributes that matter: of its own, and of its class, which it lacks."""
    kind, own = type(value), vars(value)
    read_by_torch: frozenset[str] = _read_by_torch(kind)  # type: ignore[arg-type]
    names = {*walk.relevant(own), *(read_by_torch & own.keys())}
    lacking = walk.relevant({*names_of_class(kind), "forward"} - own.keys())
    return [*sorted(names - {*_REGISTERED, *_HOOKS, *_BOOKKEEPING}), *lacking]


@functools.cache
def _read_by_torch(kind: type) -> frozenset[str]:
    """The attributes that the methods of torch's classes among a module's bases read."""
    return frozenset(
        name
        for part in kind.__mro__
        if issubclass(part, nn.Module) and part is not nn.Module and is_library_class(part)
        for value in vars(part).values()
        if isinstance(value, types.FunctionType)
        for name in names_of(value.__code__).attributes
    )


def _forms(
    tensors: Mapping[str, Tensor | None],
) -> tuple[tuple[str, Same | None, Hashable], ...]:
    return tuple((n, None if t is None else Same(t), form_of(t)) for n, t in tensors.items())


def _of_registered(walk: Walk, module: nn.Module, t: Tensor | None, what: str) -> Hashable:
    """Of a parameter or buffer: an argument is known by its form, and by where it was met first."""
    if t is None:
        return None
    return (form_of(t), walk.number(t)) if id(module) in walk.own else of_tensor(walk, t, what)


def of_tensor(walk: Walk, value: Tensor, what: str) -> Hashable:
    """Of a tensor that is read anew in each call: its memory and form must stay."""
    if walk.met(value):
        return Same(value), _place(value)
    walk.number(value)
    walk.past.tensors.append(value)
    key: list[Hashable] = [Same(value), walk.digest(value, _place, what)]
    if type(value) is Tensor or type(value) is nn.Parameter:
        walk.past.keep(kept_dict(vars(value)))
        entries = entries_of(vars(value), walk.relevant(vars(value)))
        key.append(walk.attributes(value, entries, what))
        if "grad" in walk.names and value.is_leaf:
            token = token_of(value.grad)
            walk.checks.append(Digest(f"{what}.grad", lambda: token.matches(value.grad), True))
            key.append(walk.of(value.grad, f"{what}.grad"))
    return tuple(key)


def _place(t: Tensor) -> Hashable:
    """Where a tensor's numbers lie, and in which form."""
    try:
        place = t.data_ptr()
    except RuntimeError:  # a sparse or wrapped tensor
        place = 0
    stride = t.stride() if t.layout == torch.strided else ()
    return place, t.shape, stride, t.dtype, t.device, t.requires_grad
