"""Let a module compute with other tensors in the place of its own, and leave it as it was."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gametalearn.engine.state.code import is_library_class
from gametalearn.engine.torchscript import SCRIPTED

__all__ = ["dense_embeddings", "eager", "kept_activations", "swapped", "swapping"]

swapping = threading.RLock()
"""Held while a module has other tensors in the place of its own: whoever reads those, waits."""

_GROUPS = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context, ``model`` has ``tensors`` as its parameters and buffers.

    A tensor takes the place of the one that the name stands for wherever that one is registered:
    under several names (tied parameters), and in a module that is registered several times. At the
    end the module has its own tensors again, whatever was put there meanwhile. The attributes that
    layers of PyTorch's own set as they run (such as the weight that `torch.nn.utils.weight_norm`
    computes) are put back too; what a forward of the user's own sets stays.

    Args:
        model: any module.
        tensors: by the names of `torch.nn.Module.named_parameters` and ``named_buffers``, in which a
            tensor that is registered several times has the first of its names.
    """
    with swapping:
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        places = {id(own[name]): tensor for name, tensor in tensors.items()}
        before = []
        for module in model.modules():  # each once, however often it is registered
            attributes = vars(module)
            scripted = isinstance(module, SCRIPTED)  # its modules cannot be exchanged
            groups = [attributes[group] for group in (_GROUPS[:2] if scripted else _GROUPS)]
            registered = [(group, dict(group.items())) for group in groups]
            kept = _set_by_torch(module) if not scripted else None
            before.append((attributes, kept, registered))
        try:
            for _, _, registered in before:
                for group, entries in registered[:2]:
                    for name, tensor in entries.items():
                        if id(tensor) in places:
                            group[name] = places[id(tensor)]
            yield
        finally:
            for attributes, kept, registered in before:
                if kept is not None:
                    attributes.update(kept)
                for group, entries in registered:
                    for name in [n for n in group.keys() if n not in entries]:  # noqa: SIM118
                        del group[name]
                    for name, value in entries.items():
                        group[name] = value


def _set_by_torch(module: nn.Module) -> dict[str, Any]:
    """The attributes that PyTorch's own code may set as the module runs."""
    attributes = vars(module)
    if is_library_class(type(module)):
        return dict(attributes)
    hooks = [h for h in module._forward_pre_hooks.values() if is_library_class(type(h))]
    names = [getattr(hook, "name", None) for hook in hooks]  # of a weight, for `weight_norm`
    return {name: attributes[name] for name in names if name in attributes}


@contextlib.contextmanager
def dense_embeddings(model: nn.Module) -> Iterator[None]:
    """Within this context, an embedding with ``sparse=True`` has the same gradients, but dense."""
    kinds = nn.Embedding | nn.EmbeddingBag
    if any(m.sparse for m in model.modules() if isinstance(m, kinds)):
        with _Dense():
            yield
    else:
        yield


class _Dense(TorchFunctionMode):
    """Embeddings are looked up with dense gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.embedding, F.embedding_bag):
            # the last but one of `embedding`'s own order of arguments; layers pass it as one of them
            place = 6 if func is F.embedding else 7
            if len(args) > place:
                args = (*args[:place], False, *args[place + 1 :])
            else:
                kwargs = {**(kwargs or {}), "sparse": False}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kept_activations() -> Iterator[None]:
    """Within this context, in this thread, `torch.utils.checkpoint` keeps what a block computes.

    The gradient is the same. It would compute the block again in the backward pass, when the module has its own
    parameters again. (``use_reentrant=True`` is not for `torch.autograd.grad`: PyTorch refuses it or, for a block of
    inputs without gradients, warns that there are none.)
    """
    module = sys.modules.get("torch.utils.checkpoint")
    hook = getattr(module, "_checkpoint_hook", None)
    if module is None or hook is None:
        yield
        return
    here = threading.get_ident()

    def kept(*args: Any, **more: Any) -> Any:
        return nullcontext() if threading.get_ident() == here else hook(*args, **more)

    module._checkpoint_hook = kept  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module._checkpoint_hook = hook  # type: ignore[attr-defined]


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Within this context, what `torch.compile` made runs uncompiled: it has no second derivative."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
