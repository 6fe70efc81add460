"""Passes over a traced program's graph: what nobody reads is dropped, what comes twice is merged."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from gametalearn.engine import kernels

__all__ = ["drop_lost_writes", "layout_of", "tidy", "writes_in_place", "writes_into_constants"]

aten = torch.ops.aten


def tidy(module: GraphModule) -> bool:
    """Drop what is computed twice or not used; returns whether the program writes in place."""
    graph = module.graph
    _shorten_views(graph)
    writes = writes_in_place(graph)
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


_OVERWRITING = {
    torch.ops.gametalearn.norm_grad.default,
    torch.ops.gametalearn.norm_pool_grad.default,
}


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


def writes_in_place(graph: Graph) -> bool:
    """Whether something is written in place, or may be."""
    return any(
        _mutates(n) if isinstance(n.target, OpOverload) else n.target != getitem
        for n in graph.nodes
        if n.op == "call_function"
    )


def _mutates(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _copies(node: Node) -> bool:
    """Whether it is a copy that lies in memory as its original."""
    source = node.args[0] if node.args else None
    if node.target != aten.clone.default or not isinstance(source, Node):
        return False
    copy, original = node.meta.get("val"), source.meta.get("val")
    return copy is not None and original is not None and layout_of(copy) == layout_of(original)


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


def drop_lost_writes(graph: Graph) -> None:
    """Drop writes into copies that nobody reads: a batch norm counts its batches in such a one."""
    groups: dict[Node, list[Node]] = {}
    for node, root in _roots(graph).items():
        groups.setdefault(root, []).append(node)
    for root, group in groups.items():
        if root.target == aten.clone.default and all(
            user in group for node in (root, *group) for user in node.users
        ):
            for node in reversed(group):
                graph.erase_node(node)
    graph.eliminate_dead_code()


def writes_into_constants(graph: Graph) -> bool:
    """Whether a tensor that the program reads besides its arguments is written to."""
    return any(root.op == "get_attr" and _mutates(node) for node, root in _roots(graph).items())


def _roots(graph: Graph) -> dict[Node, Node]:
    """Of each step whose result may share its first argument's memory, the step that made that."""
    roots: dict[Node, Node] = {}
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(source, Node) and _aliases(node):
            roots[node] = roots.get(source, source)
    return roots


def layout_of(t: Tensor) -> tuple[torch.dtype, list[tuple[int, int]], torch.Size]:
    """How a tensor lies in memory, where that can be told."""
    strides = [(d, s) for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)) if n > 1]
    return t.dtype, strides, t.shape
