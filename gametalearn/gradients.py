"""Per-task meta-gradients: the `TaskGradients` record, and `meta_gradients` that computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gametalearn.adaptation import (
    Gradient,
    Learner,
    LossFn,
    Params,
    default_loss,
    default_score,
    model_parameters,
)
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError

__all__ = ["TaskGradients", "adapt_and_score", "meta_gradients"]


@dataclass(frozen=True)
class TaskGradients:
    """What the inner loops of one meta-batch leave for a weighting rule: T tasks, P parameters.

    P counts the parameters that require gradients, in ``named_parameters()`` order, tied ones once;
    learned inner rates (Meta-SGD) follow them.

    Attributes:
        rows: ``(T, P)`` per-task gradients of the query loss with respect to the initial parameters.
        updates: ``(T, P)`` inner-loop update vectors theta - theta_i.
        loss: ``(T,)`` mean query loss after adaptation.
        score: ``(T,)`` query accuracy in [0, 1] for classification; the mean squared error for
            regression.
        group: ``(T,)`` int64, the objective each task belongs to.
    """

    rows: Tensor
    updates: Tensor
    loss: Tensor
    score: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        if self.rows.ndim != 2:
            raise InputError(f"TaskGradients: rows must be (T, P), got {tuple(self.rows.shape)}")

    def __len__(self) -> int:
        """The number of tasks T."""
        return self.rows.shape[0]

    @staticmethod
    def cat(parts: list[TaskGradients]) -> TaskGradients:
        """Join the tasks of several records."""
        names = [f.name for f in dataclasses.fields(TaskGradients)]
        return TaskGradients(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def predict(model: nn.Module, params: Params, x: Tensor, support_x: Tensor | None) -> Tensor:
    """The model's output under ``params``; it is neither changed nor are its buffers."""
    args = (
        (x,) if support_x is None or not getattr(model, "uses_support", False) else (x, support_x)
    )
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return functional_call(model, {**params, **buffers}, args)  # type: ignore[no-any-return]


def _autograd(create_graph: bool) -> Gradient:
    """Gradients by `torch.autograd.grad`, with zeros for parameters that the loss does not use."""

    def gradient(loss: LossFn, params: Params) -> Params:
        with torch.enable_grad():
            leaves = {n: p if p.requires_grad else p.requires_grad_() for n, p in params.items()}
            grads = torch.autograd.grad(
                loss(leaves), list(leaves.values()), create_graph=create_graph, allow_unused=True
            )
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(params.items(), grads, strict=True)
        }

    return gradient


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def meta_gradients(
    model: nn.Module,
    batch: TaskBatch,
    learner: Learner,
    *,
    meta: Params | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = default_loss,
) -> TaskGradients:
    """Exact per-task meta-gradients of one meta-batch.

    For each task i: adapt theta on the support set by ``learner``, take the mean query loss at
    theta_i, and differentiate it with respect to theta (and to learned inner rates).

    Args:
        model: any `nn.Module` from ``(B, *x)`` to predictions; it is not changed.
        batch: T episodes on the model's device.
        learner: `MAML`, `ANIL`, `MetaSGD`, `Reptile`, or your own `Learner`.
        meta: the meta-parameters to differentiate at; by default the model's own (with freshly
            started rates for a learner that has some).
        loss: ``loss(prediction, target)``, a mean; cross-entropy or squared error by default.

    Returns:
        `TaskGradients` with ``rows (T, P)`` and ``updates (T, P)``, detached.
    """
    if meta is None:
        meta = learner.meta_parameters(model_parameters(model))
    if not meta:
        raise InputError(
            f"meta_gradients: no parameter of {type(model).__name__} requires gradients"
        )
    parts = [_task_loop(model, batch[i : i + 1], learner, meta, loss) for i in range(len(batch))]
    return TaskGradients.cat(parts)


def _task_loop(
    model: nn.Module,
    task: TaskBatch,
    learner: Learner,
    meta: Params,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> TaskGradients:
    """The reference method: one task, plain autograd."""
    support_x, support_y = task.support_x[0], task.support_y[0]
    leaves = {n: p.detach().clone().requires_grad_() for n, p in meta.items()}

    def support_loss(params: Params) -> Tensor:
        return loss_fn(predict(model, params, support_x, None), support_y)

    with torch.enable_grad():
        adapted = learner.adapt(leaves, support_loss, _autograd(not learner.first_order))
        prediction = predict(model, adapted, task.query_x[0], support_x)
        query_loss = loss_fn(prediction, task.query_y[0])
    update = _flat(
        (p - adapted[n] if n in adapted else torch.zeros_like(p)) for n, p in leaves.items()
    )
    if learner.update_is_row:
        row = update
    else:
        grads = torch.autograd.grad(query_loss, list(leaves.values()), allow_unused=True)
        row = _flat(
            torch.zeros_like(p) if g is None else g
            for p, g in zip(leaves.values(), grads, strict=True)
        )
    return TaskGradients(
        rows=row.detach().unsqueeze(0),
        updates=update.detach().unsqueeze(0),
        loss=query_loss.detach().unsqueeze(0),
        score=default_score(prediction.detach(), task.query_y[0]).unsqueeze(0),
        group=task.group,
    )


def adapt_and_score(
    model: nn.Module,
    batch: TaskBatch,
    learner: Learner,
    *,
    meta: Params | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = default_loss,
) -> tuple[Tensor, Tensor]:
    """Adapt to each task and measure it on its queries, without a meta-gradient.

    Returns:
        ``loss (T,)`` and ``score (T,)``, as in `TaskGradients`.
    """
    if meta is None:
        meta = learner.meta_parameters(model_parameters(model))
    measured = []
    for i in range(len(batch)):
        x, y = batch.support_x[i], batch.support_y[i]
        params = {n: p.detach() for n, p in meta.items()}
        adapted = learner.adapt(
            params,
            lambda p, x=x, y=y: loss(predict(model, p, x, None), y),  # type: ignore[misc]
            _first_order,
        )
        with torch.no_grad():
            prediction = predict(model, adapted, batch.query_x[i], x)
            measured.append(
                (loss(prediction, batch.query_y[i]), default_score(prediction, batch.query_y[i]))
            )
    losses, scores = zip(*measured, strict=True)
    return torch.stack(losses), torch.stack(scores)


def _first_order(loss: LossFn, params: Params) -> Params:
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    return {n: g.detach() for n, g in _autograd(False)(loss, leaves).items()}
