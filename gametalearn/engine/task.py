"""What is computed for one task, whichever method runs it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gametalearn.adaptation import HEAD, Gradient, Learner, Params, SupportLoss, makes_heads
from gametalearn.engine.swap import dense_embeddings, eager, kept_activations, swapped, swapping
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError
from gametalearn.losses import Loss, apply_loss
from gametalearn.normalisation import Protocol, way_of
from gametalearn.scores import ScoreFunction, measured
from gametalearn.trees import mapped

__all__ = [
    "Data",
    "Loss",
    "Measured",
    "Recipe",
    "Result",
    "fixed_tensors",
    "is_clean",
    "note_clean",
    "predict",
    "predicted",
    "query_loss",
    "split_head",
    "standing_in",
    "started",
    "support_loss",
    "swapping",
]

Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""``support_x, support_y, query_x, query_y``."""
Result = tuple[Tensor, Tensor, Tensor, Tensor]
"""``rows (T, P), updates (T, P), loss (T,), score (T,)``."""
Measured = tuple[Tensor, Tensor]
"""``loss (T,), score (T,)``."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is computed for each task: a learner adapts the model by a loss, and a score is taken.

    Attributes:
        model, learner, loss, score: the parts.
        protocol: by which queries are predicted; None leaves the model to itself.
    """

    model: nn.Module
    learner: Learner
    loss: Loss
    score: ScoreFunction
    protocol: Protocol | None = None


def data_of(batch: TaskBatch) -> Data:
    """The four tensors of a batch."""
    return batch.support_x, batch.support_y, batch.query_x, batch.query_y


def fixed_tensors(model: nn.Module, meta: Collection[str]) -> Params:
    """What a forward reads besides the meta-parameters, whose names are given.

    Frozen parameters, those that require gradients but are no meta-parameters, and buffers.
    """
    with swapping:
        others = {n: p.detach() for n, p in model.named_parameters() if n not in meta}
        return {**others, **{n: b.detach() for n, b in model.named_buffers()}}


@contextlib.contextmanager
def standing_in(model: nn.Module, params: Params, fixed: Params) -> Iterator[None]:
    """Within, the model computes with ``params`` and what is ``fixed``, so that it can be differentiated.

    What a forward writes into ``fixed`` tensors, it writes into copies.
    """
    copies = {n: t.clone() for n, t in fixed.items()}
    with (
        swapped(model, {**copies, **params}),
        dense_embeddings(model),
        eager(),
        kept_activations(),
        sdpa_kernel(SDPBackend.MATH),  # the fused attentions have no second derivative
    ):
        yield


def predict(
    model: nn.Module,
    params: Params,
    x: Tensor,
    support_x: Tensor | None,
    fixed: Params | None = None,
    protocol: Protocol | None = None,
) -> Any:
    """The model's output under ``params``; neither the model nor its buffers are changed.

    Args:
        model: left to itself it is called as ``model(x, support_x)`` if its ``uses_support`` is true
            and ``support_x`` is given, else as ``model(x)``.
        params: the parameters that require gradients, by name.
        x: ``(B, *x)`` inputs.
        support_x: the support inputs, when ``x`` are queries.
        fixed: other parameters, and buffers; by default the model's own.
        protocol: how queries are normalised, one that the model knows (see
            `gametalearn.normalisation.check_protocol`); None leaves the model to itself.
    """
    fixed = fixed_tensors(model, params) if fixed is None else fixed
    with standing_in(model, params, fixed):
        return _called(model, x, support_x, protocol)


def _called(
    model: nn.Module, x: Tensor, support_x: Tensor | None, protocol: Protocol | None
) -> Any:
    if support_x is None:
        return model(x.clone())
    return _queries(model, x, support_x, way_of(model, protocol))


def _queries(model: nn.Module, x: Tensor, support_x: Tensor, way: Protocol | None) -> Any:
    """What a model says of queries ``x``; it gets copies, as a forward may write into its inputs."""
    by_support = getattr(model, "uses_support", False)
    if way != "query-at-a-time":
        by_support = by_support if way is None else way == "inductive"
        return model(x.clone(), support_x.clone()) if by_support else model(x.clone())
    queries = x.clone().chunk(len(x))
    if by_support:
        return _joined([model(query, support_x.clone()) for query in queries], 1)
    return _joined([model(torch.cat([support_x, query])) for query in queries], len(support_x) + 1)


def _joined(outputs: list[Any], batch: int) -> Any:
    """The last example of each output ``(batch, ...)``, one after the other, in any container."""

    def last(*parts: Tensor) -> Tensor:
        one_each = parts[0].shape[:1] == (batch,)
        return torch.cat([part[-1:] for part in parts]) if one_each else parts[0]

    return mapped(last, *outputs)


def query_loss(
    recipe: Recipe, gradient: Gradient, meta: Params, fixed: Params, data: Data
) -> tuple[Tensor, tuple[Params, Tensor, Tensor]]:
    """Adapt to one task's support set, and measure on its queries.

    Returns:
        What a row differentiates: the query loss, or for a learner with ``step_weights`` the
        weighted sum of the query losses after each step; and ``(adapted parameters, query loss,
        score)`` after the last step.
    """
    support_x, support_y, query_x, query_y = data
    model, learner, loss = recipe.model, recipe.learner, recipe.loss
    support = support_loss(model, learner, loss, fixed, support_x, support_y)

    def query(params: Params) -> tuple[Tensor, Tensor]:
        with _predicting(model, learner, params, fixed) as predicted:
            prediction = predicted(query_x, support_x, recipe.protocol)
            value = apply_loss(loss, prediction, query_y)
            points = measured(recipe.score, loss, prediction, query_y)
        _refuse_leaks(model, loss, params, value, "query")
        return value, points

    begin = started(model, learner, meta, fixed, support_x, support_y)
    weights = getattr(learner, "step_weights", ())
    if not weights:
        adapted = learner.adapt(begin, support, gradient)
        value, points = query(adapted)
        return value, (adapted, value, points)
    terms = []
    path = learner.path(begin, support, gradient)  # type: ignore[attr-defined]
    next(path)
    for weight, adapted in zip(weights, path, strict=True):
        value, points = query(adapted)
        terms.append(weight * value)
    return torch.stack(terms).sum(), (adapted, value, points)


def started(
    model: nn.Module,
    learner: Learner,
    meta: Params,
    fixed: Params,
    support_x: Tensor,
    support_y: Tensor,
) -> Params:
    """What the inner loop begins with: the meta-parameters, and the head that a learner makes."""
    if not makes_heads(learner):
        return meta
    features = predict(model, meta, support_x, None, fixed)
    head = learner.head(features, support_y)  # type: ignore[attr-defined]
    # By other names: an inner gradient is partial, with the head held apart from what it is made of.
    own = {name: p.view_as(p) for name, p in meta.items()}
    return {**own, **{HEAD + name: value for name, value in head.items()}}


@contextlib.contextmanager
def _predicting(
    model: nn.Module, learner: Learner, params: Params, fixed: Params | None
) -> Iterator[Callable[[Tensor, Tensor | None, Protocol | None], Any]]:
    """Within, the model has ``params``, and predicts; for a learner that makes one, with the head among them.

    A loss or a score that reads the model (a penalty on its weights, or what the forward has left there) belongs
    inside, where it finds what the prediction was made with, and no other thread's.
    """
    body, head = split_head(params) if makes_heads(learner) else (params, None)
    fixed = fixed_tensors(model, body) if fixed is None else fixed
    with standing_in(model, body, fixed):

        def predicted(x: Tensor, support_x: Tensor | None, protocol: Protocol | None) -> Any:
            output = _called(model, x, support_x, protocol)
            return output if head is None else learner.predict(head, output)  # type: ignore[attr-defined]

        yield predicted


def predicted(
    model: nn.Module,
    learner: Learner,
    params: Params,
    x: Tensor,
    support_x: Tensor | None,
    fixed: Params | None = None,
    protocol: Protocol | None = None,
) -> Any:
    """`predict`, and then the head among ``params`` if the learner makes one."""
    with _predicting(model, learner, params, fixed) as of:
        return of(x, support_x, protocol)


def split_head(params: Params) -> tuple[Params, Params]:
    """The model's parameters, and those of a task's own head without their prefix."""
    body = {n: p for n, p in params.items() if not n.startswith(HEAD)}
    return body, {n.removeprefix(HEAD): p for n, p in params.items() if n.startswith(HEAD)}


def support_loss(
    model: nn.Module,
    learner: Learner,
    loss: Loss,
    fixed: Params,
    support_x: Tensor,
    support_y: Tensor,
) -> SupportLoss:
    """What an inner loop descends on: the mean loss on a support set, or on a window of it."""

    def support(params: Params, first: int = 0, count: int | None = None) -> Tensor:
        x, y = (_circle(t, first, count) for t in (support_x, support_y))
        with _predicting(model, learner, params, fixed) as predicted:
            value = apply_loss(loss, predicted(x, None, None), y)
        _refuse_leaks(model, loss, params, value, "support")
        return value

    return support


_clean: WeakKeyDictionary[nn.Module, dict[tuple[str, int], weakref.ref[Any]]] = WeakKeyDictionary()
"""The losses that were looked at for a model, and found clean on the support or query set."""

NODES, LOSSES = 20_000, 64
"""The operations that it looks at, and the losses that it remembers for a model, at most."""


def _refuse_leaks(model: nn.Module, loss: Loss, params: Params, value: Tensor, of: str) -> None:
    """Refuse a forward or loss that reaches a parameter of the model past the place where it is registered.

    In a list, a partial or a closure that holds the parameter itself, the inner loop cannot put another.

    Raises:
        InputError: the first value of this loss for the model, on this set, depends on such a parameter.
    """
    with swapping:
        if not value.requires_grad or is_clean(model, loss, of):
            return
        if _get_current_dispatch_mode_stack():  # a trace has constants where these parameters are
            return
        own = {id(p): name for name, p in model.named_parameters() if name in params}
    seen: set[Any] = set()
    left = [value.grad_fn]
    while left and len(seen) < NODES:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in own:
            raise InputError(
                f"the forward or the loss reads the parameter '{own[id(variable)]}' of "
                f"{type(model).__name__} elsewhere than where it is registered, through a list, a partial "
                "or a closure, where adaptation cannot change it; read it from its module in each call, or "
                "detach() it if it is to stay as it is"
            )
        left += [following for following, _ in node.next_functions]
    note_clean(model, loss, of)


def is_clean(model: nn.Module, loss: Loss, of: str) -> bool:
    """Whether a loss was looked at for a model before, by this kind of look, and found clean."""
    known = _clean.get(model, {}).get((of, id(loss)))
    return known is not None and known() is loss


def note_clean(model: nn.Module, loss: Loss, of: str) -> None:
    """Remember that it was."""
    with swapping:
        known = _clean.setdefault(model, {})
        if len(known) >= LOSSES:
            known.clear()
        with contextlib.suppress(TypeError):  # what cannot be noted is looked at again
            known[of, id(loss)] = weakref.ref(loss)


def _circle(t: Tensor, first: int, count: int | None) -> Tensor:
    """``count`` entries of ``t`` from number ``first`` on, in a circle; all if that is no fewer."""
    size = len(t)
    if count is None or count >= size:
        return t
    first %= size
    head = t[first : first + count]
    return head if len(head) == count else torch.cat([head, t[: count - len(head)]])


def updates_of(meta: Params, adapted: Params) -> list[Tensor]:
    """theta - theta_i for each meta-parameter, zero for learned rates."""
    return [p - adapted[n] if n in adapted else torch.zeros_like(p) for n, p in meta.items()]
