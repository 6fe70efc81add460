"""Whether predictions depend on the queries beside them, measured, and the protocol that follows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gametalearn.adaptation import Learner, Params, fitted
from gametalearn.engine.loop import first_order
from gametalearn.engine.task import fixed_tensors, predict, started, support_loss, swapping
from gametalearn.episodes import TaskBatch
from gametalearn.losses import Loss
from gametalearn.normalisation import Protocol, by_batch, check_protocol, ours, refusal
from gametalearn.peek import own_parameters
from gametalearn.randomness import undisturbed
from gametalearn.trees import mapped

__all__ = ["depends_on_queries", "differs", "settled"]


def settled(
    model: nn.Module,
    protocol: Protocol | None,
    meta: Params,
    task: TaskBatch,
    learner: Learner,
    loss: Loss,
) -> Protocol:
    """The protocol by which a model's queries are predicted.

    Args:
        model: is not changed.
        protocol: the one that is wanted; None leaves the model to itself.
        meta, task, learner, loss: with which `depends_on_queries` is found out, where types do not
            settle it.

    Raises:
        InputError: the model cannot predict so.
    """
    check_protocol(model, protocol)
    if protocol == "query-at-a-time":
        return protocol
    why = by_batch(model, protocol)
    if not (why or ours(model)) and depends_on_queries(model, meta, task, learner, loss, protocol):
        why = "its predictions change with the queries beside them"
    found: Protocol = "transductive" if why else "inductive"
    if protocol is not None and protocol != found:
        raise refusal(model, protocol, why)
    return found


def depends_on_queries(
    model: nn.Module,
    meta: Params,
    task: TaskBatch,
    learner: Learner,
    loss: Loss,
    protocol: Protocol | None = None,
) -> bool:
    """Whether the first task's queries are predicted otherwise beside others than together.

    Two halves are compared with the whole, under the initial parameters and (a gate may start at
    zero) those adapted to the task; in float64 where the model can compute in it. False where two
    equal calls differ, since a forward that draws random numbers cannot be measured so.
    """
    x, support_x = task.query_x[0], task.support_x[0]
    if len(x) < 2:
        return False
    with swapping, undisturbed(x.device), torch.inference_mode(False), torch.no_grad():
        initial = own_parameters(model, meta)
        x, support_x = x.clone(), support_x.clone()
        if differs(model, initial, x, support_x, protocol):
            return True
        support_y, fixed = task.support_y[0].clone(), fixed_tensors(model, meta)
        learner = fitted(learner.for_test(learner.steps), task.support_y)
        support = support_loss(model, learner, loss, fixed, support_x, support_y)
        start = {n: p.detach().clone() for n, p in meta.items()}
        begin = started(model, learner, start, fixed, support_x, support_y)
        adapted = learner.adapt(begin, support, first_order)
        return differs(model, own_parameters(model, adapted), x, support_x, protocol)


def differs(
    model: nn.Module,
    params: Params,
    x: Tensor,
    support_x: Tensor,
    protocol: Protocol | None = None,
) -> bool:
    """Whether half of the queries ``x`` are predicted otherwise than all of them, under ``params``.

    In float64 if the model can compute in it, otherwise in its own precision; True if it cannot
    predict half of them at all, False if it draws random numbers.
    """
    fixed = fixed_tensors(model, params)

    def halves(params: Params, fixed: Params, x: Tensor, support_x: Tensor, limit: float) -> bool:
        def outputs(x: Tensor) -> list[Tensor]:
            found: list[Tensor] = []
            mapped(found.append, predict(model, params, x, support_x, fixed, protocol))
            return [t.detach() for t in found if t.shape[:1] == x.shape[:1]]

        together = outputs(x)
        if any(_far(a, b, limit) for a, b in zip(together, outputs(x), strict=True)):
            return False
        return any(
            _far(whole[start::2], half, limit)
            for start in (0, 1)
            for whole, half in zip(together, outputs(x[start::2]), strict=True)
        )

    try:  # rounding is far from anything else there
        params64, fixed64 = ({n: _wide(t) for n, t in part.items()} for part in (params, fixed))
        return halves(params64, fixed64, _wide(x), _wide(support_x), 1e-6)
    except Exception:  # a forward may insist on its own precision
        pass
    dtypes = [p.dtype for p in params.values() if p.is_floating_point()] or [torch.float32]
    limit = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    predict(model, params, x, support_x, fixed, protocol)  # its own errors are for the caller
    try:
        return halves(params, fixed, x, support_x, limit)
    except Exception:
        return True  # a part of the queries cannot do without the others


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _far(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether two outputs differ by more than ``limit`` of the largest; not where one diverged."""
    if a.shape != b.shape:
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return not torch.equal(a, b)
    if not bool(torch.isfinite(a).all()):
        return False
    difference = (a - b).abs().max() if a.numel() else a.new_zeros(())
    return not bool(difference <= limit * a.abs().max())
