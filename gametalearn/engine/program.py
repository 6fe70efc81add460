"""Trace the computation for a chunk of tasks into a flat program, and tidy it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import functionalize, grad, grad_and_value, vmap
from torch.fx import Graph, GraphModule, Interpreter, Node

from gametalearn.adaptation import Gradient, LossFn, Params
from gametalearn.engine import kernels
from gametalearn.engine.capture import Capture, UntraceableError, ValueReads
from gametalearn.engine.script import Script, script_of
from gametalearn.engine.task import Data, Recipe, query_loss, updates_of

__all__ = ["Program", "UntraceableError", "laid_out", "trace_gradients", "trace_scores"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Program:
    """``program(*meta, *fixed, support_x, support_y, query_x, query_y)`` of a chunk.

    The tensors lie in memory as `laid_out` gives them.

    Attributes:
        module: the traced program.
        script: the same without Python, where it can be had.
        writes: whether it writes in place: its arguments then have to be copies.
        nonzero: the numbers of arguments without a zero in them. A max-pool after a batch norm is
            computed before it; where gamma is zero all values of a window are equal after it, and
            the derivative is that of another one of them.
    """

    module: GraphModule
    script: Script | None
    writes: bool
    nonzero: tuple[int, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        run: Script = self.module if self.script is None else self.script
        return run(*(t.clone() for t in tensors) if self.writes else tensors)


def _functional(first_order: bool) -> Gradient:
    def gradient(loss: LossFn, params: Params) -> Params:
        grads: Params = grad(loss)(params)
        return {n: g.detach() for n, g in grads.items()} if first_order else grads

    return gradient


def trace_gradients(recipe: Recipe, meta: Params, fixed: Params, data: Data) -> Program:
    """A program that returns ``*rows, *updates, loss, score`` for tasks shaped as in ``data``.

    Rows and updates come one meta-parameter at a time, ``(T, *shape)``; rows are left out for a
    learner whose rows are its updates.
    """
    gradient = _functional(recipe.learner.first_order)

    def task(meta: Params, fixed: Params, *data: Tensor) -> tuple[Tensor, ...]:
        def objective(meta: Params) -> tuple[Tensor, tuple[Params, Tensor, Tensor]]:
            return query_loss(recipe, gradient, meta, fixed, data)  # type: ignore[arg-type]

        if recipe.learner.update_is_row:
            _, (adapted, value, points) = objective(meta)
            return (*updates_of(meta, adapted), value, points)
        grads, (_, (adapted, value, points)) = grad_and_value(objective, has_aux=True)(meta)
        return (*grads.values(), *updates_of(meta, adapted), value, points)

    return _trace(task, meta, fixed, data)


def trace_scores(recipe: Recipe, meta: Params, fixed: Params, data: Data) -> Program:
    """A program that returns ``loss, score`` for tasks shaped as in ``data``."""
    gradient = _functional(True)

    def task(meta: Params, fixed: Params, *data: Tensor) -> tuple[Tensor, ...]:
        _, (_, value, points) = query_loss(recipe, gradient, meta, fixed, data)  # type: ignore[arg-type]
        return value, points

    return _trace(task, meta, fixed, data)


def _trace(
    task: Callable[..., tuple[Tensor, ...]], meta: Params, fixed: Params, data: Data
) -> Program:
    from torch.fx.experimental.proxy_tensor import make_fx  # a second of imports

    names, others = list(meta), list(fixed)
    nonzero: set[int] = set()

    def chunk(*tensors: Tensor) -> tuple[Tensor, ...]:
        # Weights of convolutions lie as the folded convolutions want them.
        values = [
            p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p
            for p in tensors[: len(names)]
        ]
        meta = dict(zip(names, values, strict=True))
        fixed = dict(zip(others, tensors[len(names) : -4], strict=True))
        data = tensors[-4:]
        result: tuple[Tensor, ...]
        with Capture() as capture, ValueReads():  # type: ignore[no-untyped-call]
            if len(data[0]) == 1:  # without vmap there is half as much to trace
                result = tuple(t.unsqueeze(0) for t in task(meta, fixed, *(t[0] for t in data)))
            else:
                result = vmap(task, in_dims=(None, None, 0, 0, 0, 0))(meta, fixed, *data)
        for gamma in capture.gammas:
            nonzero.update(i for i, value in enumerate(values) if value is gamma)
            # a forward gets copies of frozen parameters: all that it could be
            nonzero.update(
                len(names) + i
                for i, (name, value) in enumerate(fixed.items())
                if name.endswith("weight") and value.shape == gamma.shape[-1:]
            )
        return result

    # Copies, as the forward may write into them.
    tensors = [laid_out(t).clone() for t in (*meta.values(), *fixed.values(), *data)]
    module = _on_fake_tensors(chunk, tensors)
    if module is None:  # PyTorch misjudges how an operator's result lies in memory
        with _tracing(), _one_fake_mode():
            module = make_fx(chunk)(*tensors)
        module = _pure(module, tensors)
    writes = tidy(module)
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    script = script_of(module, _constants(module), tensors) if on_cpu else None
    return Program(module, script, writes, tuple(sorted(nonzero)))


def _on_fake_tensors(
    chunk: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]
) -> GraphModule | None:
    """The traced program; None if it takes tensors to lie in memory as they do not."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with _tracing():
        module = make_fx(chunk, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    if _Layouts(module).hold(tensors):
        pure = _pure(module, None)
        if pure is module or _Layouts(pure).hold(tensors):
            return pure
    return None


def _pure(module: GraphModule, tensors: list[Tensor] | None) -> GraphModule:
    """The program without what nobody reads, and without writes in place.

    A forward may write into its tensors. Now that the derivatives are written down, every such write
    can become a new tensor (`torch.func.functionalize`); before, it could not: what was taken down
    without autograd has lost ``no_grad``, ``detach`` and the like.

    Args:
        module: the program.
        tensors: its arguments, to be traced on; by default on tensors without memory.

    Raises:
        UntraceableError: it draws random numbers, or writes into a tensor that it does not make.
    """
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UntraceableError("its forward draws random numbers")
    _drop_lost_writes(module.graph)
    if not _writes(module.graph):
        return module
    if _writes_into_constants(module.graph):
        raise UntraceableError("its forward writes into a tensor that is no buffer of it")
    from torch.fx.experimental.proxy_tensor import make_fx

    functional: Any = functionalize(module, remove="mutations")
    if tensors is None:
        inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
        tensors = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in inputs
        ]
        with _tracing():
            pure = make_fx(functional, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    else:
        with _tracing(), _one_fake_mode():
            pure = make_fx(functional)(*(t.clone() for t in tensors))
    for node in reversed(pure.graph.nodes):  # arguments are copies: what is written there is lost
        if node.target == aten.copy_.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[1])
            pure.graph.erase_node(node)
    pure.graph.eliminate_dead_code()
    return pure


def _drop_lost_writes(graph: Graph) -> None:
    """Drop writes into copies that nobody reads: a batch norm counts its batches in such a one."""
    members: dict[Node, list[Node]] = {}
    roots: dict[Node, Node] = {}
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(source, Node) and _aliases(node):
            roots[node] = base = roots.get(source, source)
            members.setdefault(base, []).append(node)
    for base, group in members.items():
        if base.target == aten.clone.default and all(
            user in group for node in (base, *group) for user in node.users
        ):
            for node in reversed(group):
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _writes_into_constants(graph: Graph) -> bool:
    """Whether a tensor that the program reads besides its arguments is written to."""
    roots: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        source = node.args[0]
        if isinstance(source, Node) and _aliases(node):
            roots[node] = base = roots.get(source, source)
            writes = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
            if writes and base.op == "get_attr":
                return True
    return False


@contextmanager
def _tracing() -> Iterator[None]:
    """Refuse what a trace would take down wrongly: scripted functions.

    TorchScript differentiates a function of its own accord, once.
    """
    call, thread = torch.jit.ScriptFunction.__call__, threading.get_ident()

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise UntraceableError("it calls a function that torch.jit compiled")
        return call(self, *args, **kwargs)

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    quiet = logger.disabled
    torch.jit.ScriptFunction.__call__ = refuse  # type: ignore[method-assign]
    logger.disabled = True  # what cannot be traced is said by ourselves, in a line
    try:
        yield
    finally:
        torch.jit.ScriptFunction.__call__ = call  # type: ignore[method-assign]
        logger.disabled = quiet


def laid_out(t: Tensor) -> Tensor:
    """Contiguous, with the strides that only a fresh tensor of this shape surely has."""
    return t.detach().contiguous().view(-1).view(t.shape)


def _constants(module: GraphModule) -> list[Tensor]:
    """The tensors that a program reads besides its arguments."""
    names = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    values = [attrgetter(name)(module) for name in names]
    return [v for v in values if isinstance(v, Tensor)]


class _Layouts(Interpreter):
    """Runs a program, and notes whether its tensors lie in memory as the trace took them to."""

    wrong = False

    def hold(self, tensors: list[Tensor]) -> bool:
        """Whether all do, for these inputs."""
        try:
            with torch.inference_mode():
                self.run(*tensors)
        except RuntimeError:  # a view that is none
            return False
        return not self.wrong

    def run_node(self, n: Node) -> Any:
        result, expected = super().run_node(n), n.meta.get("val")
        if isinstance(result, Tensor) and isinstance(expected, Tensor):
            self.wrong |= _layout(result) != _layout(expected)
        return result


def _layout(t: Tensor) -> tuple[torch.dtype, list[tuple[int, int]], torch.Size]:
    strides = [(d, s) for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)) if n > 1]
    return t.dtype, strides, t.shape


@contextmanager
def _one_fake_mode() -> Iterator[None]:
    """Let `make_fx` describe results in one fake mode; it makes one an operator otherwise.

    That takes a stack trace each time, which doubles the time of a trace.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode

    with tracing(TracingContext(FakeTensorMode(allow_non_fake_inputs=True))):
        yield


def tidy(module: GraphModule) -> bool:
    """Drop what is computed twice or not used; returns whether the program writes in place."""
    graph = module.graph
    _shorten_views(graph)
    writes = _writes(graph)
    if not writes:  # else order matters
        _merge(graph)
        _fold_factors(graph)
    graph.eliminate_dead_code()
    _overwrite(graph)
    for node in graph.nodes:  # a replay needs no dispatcher
        node.target = kernels.PLAIN.get(node.target, node.target)
    graph.lint()
    module.recompile()
    return writes


_VIEWS = {
    *(aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int),
    *(aten.t.default, aten.unsqueeze.default, aten.expand.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.detach.default, aten.alias.default),
}
"""Views that start where their tensor starts."""


def _shorten_views(graph: Graph) -> None:
    """Replace a chain of views by one `as_strided`, or by nothing where it comes back."""
    root: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _VIEWS:
            continue
        source = node.args[0]
        root[node] = base = root.get(source, source)
        value, start = node.meta.get("val"), base.meta.get("val")
        if value is None or start is None:
            continue
        if value.shape == start.shape and value.stride() == start.stride():
            node.replace_all_uses_with(base)
        else:
            node.target = aten.as_strided.default
            node.args = (base, list(value.shape), list(value.stride()))
            node.kwargs = {}


def _factor(value: Any) -> tuple[Any, float]:
    """A node that is ``x * number`` or ``-x`` as ``(x, number)``."""
    if isinstance(value, Node) and len(value.users) == 1:
        if value.target == aten.mul.Tensor and isinstance(value.args[1], float):
            x, factor = _factor(value.args[0])
            return x, factor * value.args[1]
        if value.target == aten.neg.default:
            x, factor = _factor(value.args[0])
            return x, -factor
    return value, 1.0


def _fold_factors(graph: Graph) -> None:
    """``a + c x`` and ``a - c x`` in one pass, as in ``theta - inner_lr * gradient``."""
    sign = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}
    for node in graph.nodes:
        if node.target in sign and not node.kwargs and all(isinstance(a, Node) for a in node.args):
            x, factor = _factor(node.args[1])
            if x is not node.args[1] and x.meta["val"].dtype == node.meta["val"].dtype:
                node.kwargs = {"alpha": sign[node.target] * factor}
                node.target, node.args = aten.add.Tensor, (node.args[0], x)


def _overwrite(graph: Graph) -> None:
    """Let the first derivative of a norm take the place of its input, where that is read last."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    convolution = torch.ops.gametalearn.conv.default
    for node in graph.nodes:
        if node.target not in _OVERWRITING:
            continue
        y = node.args[1]
        base = y.args[0] if y.target == aten.as_strided.default else y
        if base.target != convolution:
            continue
        views = [u for u in base.users if u.target == aten.as_strided.default]
        readers = {*base.users, *(u for view in views for u in view.users)}
        if any(u.target == aten.as_strided.default for view in views for u in view.users):
            continue
        last = all(order[r] <= order[node] for r in readers)
        if last and node.args[0] not in (y, *views, base) and not any(map(_aliases, readers)):
            node.args = (*node.args, True)


def _aliases(node: Node) -> bool:
    """Whether a step's result may share memory with an argument, `as_strided` apart."""
    if node.target == aten.as_strided.default:
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


_OVERWRITING = {
    torch.ops.gametalearn.norm_grad.default,
    torch.ops.gametalearn.norm_pool_grad.default,
}


def _writes(graph: Graph) -> bool:
    """Whether something is written in place, or may be."""
    return any(
        n.target._schema.is_mutable if isinstance(n.target, OpOverload) else n.target != getitem
        for n in graph.nodes
        if n.op == "call_function"
    )


def _copies(node: Node) -> bool:
    """Whether it is a copy that lies in memory as its original."""
    source = node.args[0] if node.args else None
    if node.target != aten.clone.default or not isinstance(source, Node):
        return False
    copy, original = node.meta.get("val"), source.meta.get("val")
    return copy is not None and original is not None and _layout(copy) == _layout(original)


def _merge(graph: Graph) -> None:
    """Replace a node by an earlier one of the same operator and arguments; drop aliases and copies."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.detach.default, aten.alias.default) or _copies(node):
            node.replace_all_uses_with(node.args[0])
        else:
            key = (node.target, repr(node.args), repr(node.kwargs))
            twin = seen.setdefault(key, node)
            if twin is node:
                continue
            node.replace_all_uses_with(twin)
        graph.erase_node(node)
