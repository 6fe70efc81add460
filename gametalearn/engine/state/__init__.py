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

What cannot be seen is said in the engine's README.

The pieces: `code` reads the names in a function's bytecode; `walk` goes from value to value, and
`containers`, `functions`, `classes`, `objects` and `networks` say what is done with each kind;
`records` are what comes of it, and tell what has changed; `past` puts back what a forward has changed.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import functools
import io
import logging
import mmap
import operator
import random
import threading
import types
import weakref
from collections.abc import Hashable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from gametalearn.engine.errors import UnreplayableError
from gametalearn.engine.state import classes, containers, functions, networks, objects
from gametalearn.engine.state.past import Past
from gametalearn.engine.state.records import Watch
from gametalearn.engine.state.walk import Visits, Walk
from gametalearn.engine.torchscript import SCRIPTED, refuse_scripted

__all__ = ["Past", "Watch", "reaches", "watch"]

_CALLED = frozenset({
    "training", "forward", "backward", "setup_context", "vmap", "jvp", "apply",
    "adapt", "path", "meta_parameters", "for_test", "steps", "first_order", "update_is_row",
    "step_weights", "uses_support", "head", "predict", "for_ways",
})  # fmt: skip
"""Names under which PyTorch and the engine itself look for something."""


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
    walk, key = _walked(root, frozenset(map(id, own)))
    return Watch((type(root), key), tuple(walk.checks)), walk.past


def reaches(root: object, some: Iterable[object]) -> bool:
    """Whether a loss, say, can reach one of some objects; also where that cannot be found out."""
    try:
        walk, _ = _walked(root, frozenset())
    except UnreplayableError:
        return True
    return any(walk.met(one) for one in some)


def _walked(root: object, own: frozenset[int]) -> tuple[Walk, Hashable]:
    """A walk from ``root``, and the key of what it found."""
    names: set[str] = set(_CALLED)
    everything = False
    try:
        while True:  # a function that is found may name attributes of what was seen before
            walk = Walk(own, frozenset(names), everything, _ALWAYS, _ONCE)
            key = walk.of(root, "")
            if walk.found <= names and walk.computed <= everything:
                return walk, key
            names |= walk.found
            everything |= walk.computed
    except RecursionError:
        raise UnreplayableError(
            "it depends on values that refer to each other too deeply"
        ) from None


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
_ALWAYS: Visits = (
    ((weakref.ProxyType, weakref.CallableProxyType), objects.of_weak_proxy),
    (_BUILTIN, objects.of_builtin),
    (Tensor, networks.of_tensor),
    (type, classes.of_class),
)
"""What is done with values that may say something new when they are met again."""
_ONCE: Visits = (
    (SCRIPTED, refuse_scripted),
    (_UNFROZEN, objects.refuse),
    (nn.Module, networks.of_module),
    (types.FunctionType, functions.of_function),
    (types.MethodType, functions.of_method),
    (functools.partial, functions.of_partial),
    ((staticmethod, classmethod, functools._lru_cache_wrapper), functions.of_wrapper),
    (property, functions.of_property),
    (functools.cached_property, functions.of_cached_property),
    (types.ModuleType, classes.of_python_module),
    (np.ndarray, containers.of_array),
    ((bytearray, array.array), containers.of_bytes),
    ((ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union), containers.of_bytes),
    ((operator.attrgetter, operator.methodcaller, operator.itemgetter), functions.of_getter),
    (types.MappingProxyType, containers.of_proxy),
    ((type({}.keys()), type({}.values()), type({}.items())), containers.of_view),
    (weakref.ref, objects.of_reference),
    (contextvars.ContextVar, objects.of_variable),
    (dict, containers.of_dict),
    (tuple, containers.of_tuple),
    ((set, frozenset), containers.of_set),
    ((list, collections.deque), containers.of_list),
    ((range, slice), objects.of_text),
    (object, objects.of_instance),
)
"""What is done with the others when they are met for the first time; the first that fits."""
