"""The reference method: plain autograd, one task after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gametalearn.adaptation import Gradient, LossFn, Params
from gametalearn.engine.task import (
    Data,
    Measured,
    Recipe,
    Result,
    fixed_tensors,
    query_loss,
    updates_of,
)

__all__ = ["first_order", "loop_gradients", "loop_scores"]


def _autograd(create_graph: bool) -> Gradient:
    """Gradients by `torch.autograd.grad`, with zeros for parameters that the loss does not use."""

    def gradient(loss: LossFn, params: Params) -> Params:
        with torch.enable_grad():
            leaves = {n: p if p.requires_grad else p.requires_grad_() for n, p in params.items()}
            value = loss(leaves)
            if not value.requires_grad:  # it depends on none of them
                return {n: torch.zeros_like(p) for n, p in params.items()}
            grads = torch.autograd.grad(
                value, list(leaves.values()), create_graph=create_graph, allow_unused=True
            )
        return {
            n: torch.zeros_like(p) if g is None else _dense(g)
            for (n, p), g in zip(params.items(), grads, strict=True)
        }

    return gradient


def _checkpointed(loss: LossFn, params: Params) -> Params:
    """`_autograd` whose graph keeps ``params`` alone, and is computed again in the backward pass.

    An inner step is then differentiated by a Hessian-vector product at its parameters, and the
    memory of a task does not grow with its steps.
    """
    result: Params = checkpoint(_autograd(True), loss, params, use_reentrant=False)
    return result


def first_order(loss: LossFn, params: Params) -> Params:
    """Gradients that are constants, at parameters that are."""
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    return {n: g.detach() for n, g in _autograd(False)(loss, leaves).items()}


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _task(recipe: Recipe, gradient: Gradient, meta: Params, fixed: Params, data: Data) -> Result:
    leaves = {n: p.detach().clone().requires_grad_() for n, p in meta.items()}
    with torch.enable_grad():
        objective, (adapted, value, points) = query_loss(recipe, gradient, leaves, fixed, data)
    update = _flat(updates_of(leaves, adapted))
    if recipe.learner.update_is_row:
        row = update
    elif not objective.requires_grad:
        row = torch.zeros_like(update)
    else:
        grads = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
        row = _flat(
            torch.zeros_like(p) if g is None else _dense(g)
            for p, g in zip(leaves.values(), grads, strict=True)
        )
    return row.detach(), update.detach(), value.detach(), points


def _recordable(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same numbers in tensors that autograd takes, also from within `torch.inference_mode`."""
    with torch.inference_mode(False):
        return [t.clone() if t.is_inference() else t for t in tensors]


def _arguments(
    recipe: Recipe, meta: Params, data: Data, fixed: Params | None
) -> tuple[Params, Data]:
    fixed = fixed_tensors(recipe.model, meta) if fixed is None else fixed
    values = _recordable(fixed.values())
    return dict(zip(fixed, values, strict=True)), tuple(_recordable(data))  # type: ignore[return-value]


def loop_gradients(
    recipe: Recipe,
    meta: Params,
    data: Data,
    constant_memory: bool = False,
    *,
    fixed: Params | None = None,
) -> Result:
    """Rows, updates, loss and score of every task.

    Args:
        recipe, meta, data: what is computed, where, and on what.
        constant_memory: of second order, the graphs of the inner steps are not kept but computed
            again, about 30% slower.
        fixed: other parameters, and buffers; by default the model's own.
    """
    fixed, data = _arguments(recipe, meta, data, fixed)
    second = _checkpointed if constant_memory else _autograd(True)
    gradient = _autograd(False) if recipe.learner.first_order else second
    with torch.inference_mode(False):
        tasks = [_task(recipe, gradient, meta, fixed, task) for task in zip(*data, strict=True)]
    rows, updates, losses, scores = (torch.stack(column) for column in zip(*tasks, strict=True))
    return rows, updates, losses, scores


def loop_scores(
    recipe: Recipe, meta: Params, data: Data, *, fixed: Params | None = None
) -> Measured:
    """Loss and score of every task after adaptation, without a meta-gradient."""
    fixed, data = _arguments(recipe, meta, data, fixed)
    measured = []
    with torch.inference_mode(False), torch.no_grad():
        meta = {n: p.detach().clone() for n, p in meta.items()}
        for task in zip(*data, strict=True):
            _, (_, value, points) = query_loss(recipe, first_order, meta, fixed, task)
            measured.append((value, points))
    losses, scores = zip(*measured, strict=True)
    return torch.stack(losses), torch.stack(scores)
