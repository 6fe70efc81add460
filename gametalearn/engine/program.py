"""Trace the computation for a chunk of tasks into a flat program."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, grad, grad_and_value, vmap
from torch.fx import GraphModule, Interpreter, Node

from gametalearn.adaptation import Gradient, LossFn, Params
from gametalearn.engine.capture import Capture, ValueReads
from gametalearn.engine.errors import UnreplayableError
from gametalearn.engine.passes import (
    drop_lost_writes,
    layout_of,
    tidy,
    writes_in_place,
    writes_into_constants,
)
from gametalearn.engine.task import Data, Recipe, query_loss, updates_of
from gametalearn.engine.torchscript import TensorFunction, script_of, scripts_refused

__all__ = ["Program", "laid_out", "trace_gradients", "trace_scores"]

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
    script: TensorFunction | None
    writes: bool
    nonzero: tuple[int, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        run: TensorFunction = self.module if self.script is None else self.script
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
    chunk, nonzero = _of_chunk(task, list(meta), list(fixed))
    # Copies, as the forward may write into them.
    tensors = [laid_out(t).clone() for t in (*meta.values(), *fixed.values(), *data)]
    module = _on_fake_tensors(chunk, tensors)
    if module is None:  # PyTorch misjudges how an operator's result lies in memory
        module = _pure(_make_fx(chunk, tensors, fake=False), tensors)
    writes = tidy(module)
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    script = script_of(module, _constants(module), tensors) if on_cpu else None
    return Program(module, script, writes, tuple(sorted(nonzero)))


def _of_chunk(
    task: Callable[..., tuple[Tensor, ...]], names: list[str], others: list[str]
) -> tuple[TensorFunction, set[int]]:
    """The function of a chunk of tasks that is traced, and `Program.nonzero`, filled as it runs."""
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

    return chunk, nonzero


def _on_fake_tensors(chunk: TensorFunction, tensors: list[Tensor]) -> GraphModule | None:
    """The traced program; None if it takes tensors to lie in memory as they do not."""
    module = _make_fx(chunk, tensors, fake=True)
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
        UnreplayableError: it draws random numbers, or writes into a tensor that it does not make.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UnreplayableError("its forward draws random numbers")
    drop_lost_writes(graph)
    if not writes_in_place(graph):
        return module
    if writes_into_constants(graph):
        raise UnreplayableError("its forward writes into a tensor that is no buffer of it")
    functional: Any = functionalize(module, remove="mutations")
    if tensors is None:
        inputs = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
        likes = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in inputs
        ]
        pure = _make_fx(functional, likes, fake=True)
    else:
        pure = _make_fx(functional, [t.clone() for t in tensors], fake=False)
    for node in reversed(pure.graph.nodes):  # arguments are copies: what is written there is lost
        if node.target == aten.copy_.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[1])
            pure.graph.erase_node(node)
    pure.graph.eliminate_dead_code()
    return pure


def _make_fx(function: TensorFunction, tensors: list[Tensor], *, fake: bool) -> GraphModule:
    """The graph of a function, traced on tensors without memory or on these themselves."""
    from torch.fx.experimental.proxy_tensor import make_fx  # a second of imports

    with scripts_refused(), _silenced():
        if fake:
            return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        with _one_fake_mode():
            return make_fx(function)(*tensors)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep PyTorch from logging what cannot be traced: we say that ourselves, in a line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _one_fake_mode() -> Iterator[None]:
    """Let `make_fx` describe results in one fake mode; it makes one an operator otherwise.

    That takes a stack trace each time, which doubles the time of a trace.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode

    with tracing(TracingContext(FakeTensorMode(allow_non_fake_inputs=True))):
        yield


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
            self.wrong |= layout_of(result) != layout_of(expected)
        return result
