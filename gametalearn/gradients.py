"""Per-task meta-gradients: the `TaskGradients` record, and `meta_gradients` that computes it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gametalearn.adaptation import (
    HEAD,
    Learner,
    Params,
    fitted,
    makes_heads,
    model_parameters,
)
from gametalearn.engine.late import refuse_late
from gametalearn.engine.loop import loop_gradients, loop_scores
from gametalearn.engine.plan import Method, choose
from gametalearn.engine.replay import replay_gradients, replay_scores
from gametalearn.engine.swap import swapping
from gametalearn.engine.task import Recipe, data_of, predict
from gametalearn.episodes import TaskBatch, require_batch
from gametalearn.errors import InputError, summary
from gametalearn.losses import Loss, default_loss, name_of
from gametalearn.normalisation import Protocol, check_protocol
from gametalearn.records import one_line
from gametalearn.scores import ScoreLike, default_score, no_default, score_function

__all__ = ["TaskGradients", "adapt_and_score", "meta_gradients", "predict"]


@dataclass(frozen=True)
class TaskGradients:
    """What the inner loops of one meta-batch leave for a weighting rule: T tasks, P parameters.

    P counts the parameters that require gradients, in ``named_parameters()`` order, tied ones once;
    learned inner rates (Meta-SGD) follow them.

    Attributes:
        rows: ``(T, P)`` per-task gradients of the query loss with respect to the initial parameters.
        updates: ``(T, P)`` inner-loop update vectors theta - theta_i.
        loss: ``(T,)`` mean query loss after adaptation.
        score: ``(T,)`` query accuracy in [0, 1] for classification, the mean squared error for
            regression, or what ``score=`` asked for; NaN where the loss is not finite.
        group: ``(T,)`` int64, the objective each task belongs to.
    """

    rows: Tensor
    updates: Tensor
    loss: Tensor
    score: Tensor
    group: Tensor

    __repr__ = one_line

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


def meta_gradients(
    model: nn.Module,
    batch: TaskBatch,
    learner: Learner,
    *,
    meta: Params | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    protocol: Protocol | None = None,
    method: Method = "auto",
    chunk: int | None = None,
    threads: int | None = None,
    constant_memory: bool = False,
) -> TaskGradients:
    """Exact per-task meta-gradients of one meta-batch.

    For each task i: adapt theta on the support set by ``learner``, take the mean query loss at
    theta_i, and differentiate it with respect to theta (and to learned inner rates).

    Args:
        model: any `nn.Module` from ``(B, *x)`` to predictions; it is not changed: what a forward writes
            into its buffers is dropped.
        batch: T episodes on the model's device.
        learner: `MAML`, `ANIL`, `MetaSGD`, `Reptile`, or your own `Learner`.
        meta: the meta-parameters to differentiate at; by default the model's own (with freshly
            started rates for a learner that has some).
        loss: ``loss(prediction, target)``, a mean; cross-entropy or squared error by default. The
            prediction is what the model returns, be it a tensor, a tuple or a dictionary. It may read
            the model, for a penalty on its weights or a term that the forward left there. What it
            depends on may change from call to call (see `gametalearn.engine.state`).
        score: a name of `gametalearn.SCORES`, a `Score`, or a function of ``(prediction, target)``
            that gives a scalar tensor; by default what goes with the loss (see
            `gametalearn.scores`). Where nothing does, scores are NaN, and a warning says so once.
        protocol: how queries are normalised (see `gametalearn.normalisation.Protocol`); by default
            what the model does by itself. `evaluate` also measures whether a model of your own keeps
            to it; here types alone are looked at.
        method: ``"replay"`` (traced once for these shapes, then fast), ``"loop"`` (plain autograd),
            ``"verify"`` (replay, and every task compared with the loop), or ``"auto"``: replay on CPU
            and CUDA without autocast. A program is compared with the loop when it is made, and again
            at calls 2, 10, 100, ...; where they differ, or a module cannot be replayed, it falls to
            the loop with one warning.
        chunk: tasks computed by one replay; chosen from the shapes by default.
        threads: threads to split the tasks across; by default `torch.get_num_threads`.
        constant_memory: for many inner steps of second order: memory that does not grow with them,
            for two to three times the time. Tasks are looped over, and each inner step is
            differentiated by a Hessian-vector product when its turn comes.

    Returns:
        `TaskGradients` with ``rows (T, P)`` and ``updates (T, P)``, detached; empty for no tasks.

    Raises:
        InputError: no parameter requires gradients, or the forward or the loss reads one past the place
            where it is registered; a loss or a score that does not fit the predictions, a label without
            an output, a protocol that the model does not know, or an operation of which PyTorch has no
            second derivative.
    """
    check_protocol(model, protocol)
    require_batch(batch, "meta_gradients: `batch` is")
    meta, function, data = meta_of(model, learner, meta), score_function(score), data_of(batch)
    if constant_memory and method in ("replay", "verify"):
        raise InputError(
            f"meta_gradients: constant_memory=True loops over tasks; it takes no method='{method}'"
        )
    recipe = Recipe(model, fitted(learner, batch.support_y), loss, function, protocol)
    if not len(batch):
        none, size = _nothing(meta), sum(p.numel() for p in meta.values())
        return TaskGradients(none.view(0, size), none.view(0, size), none, none, batch.group)
    _refuse_later(model, meta)
    with explained(model, batch.support_x):
        refuse_late(model, learner, loss, meta, data[0][0], data[1][0])
        plan = choose(meta, data, recipe.learner, method=method, chunk=chunk, threads=threads)
        if plan.method == "loop" or constant_memory:
            result = loop_gradients(recipe, meta, data, constant_memory)
        else:
            result = replay_gradients(recipe, meta, data, plan)
    rows, updates, value, points = result
    points = finite_scores(model, loss, function, value, points)
    return TaskGradients(rows, updates, value, points, group=batch.group)


def adapt_and_score(
    model: nn.Module,
    batch: TaskBatch,
    learner: Learner,
    *,
    meta: Params | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    protocol: Protocol | None = None,
    method: Method = "auto",
    chunk: int | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Adapt to each task and measure it on its queries, without a meta-gradient.

    Args:
        model, batch, learner, meta, loss, score, protocol, method, chunk, threads: as in
            `meta_gradients`.

    Returns:
        ``loss (T,)`` and ``score (T,)``, as in `TaskGradients`.

    Raises:
        InputError: as in `meta_gradients`.
    """
    check_protocol(model, protocol)
    require_batch(batch, "adapt_and_score: `batch` is")
    meta, function, data = meta_of(model, learner, meta), score_function(score), data_of(batch)
    if not len(batch):
        return _nothing(meta), _nothing(meta)
    recipe = Recipe(model, fitted(learner, batch.support_y), loss, function, protocol)
    with explained(model, batch.support_x):
        refuse_late(model, learner, loss, meta, data[0][0], data[1][0])
        plan = choose(
            meta, data, recipe.learner, method=method, chunk=chunk, threads=threads, scores=True
        )
        if plan.method == "loop":
            value, points = loop_scores(recipe, meta, data)
        else:
            value, points = replay_scores(recipe, meta, data, plan)
    return value, finite_scores(model, loss, function, value, points)


def meta_of(model: nn.Module, learner: Learner, meta: Params | None) -> Params:
    """The meta-parameters, those of the model where none are given.

    Raises:
        InputError: there are none, one is given that the model does not have, or a name is taken.
    """
    kind = type(model).__name__
    require_instance(learner)
    with swapping:
        if meta is None:
            meta = learner.meta_parameters(model_parameters(model))
        names = {name for name, _ in model.named_parameters()}
    if others := {n for n in meta if n not in names}:
        others -= learner.meta_parameters(model_parameters(model)).keys()
        if others:
            raise InputError(
                f"meta: {kind} has no parameter '{min(others)}', nor has {type(learner).__name__}; its names "
                "are those of named_parameters()"
            )
    if makes_heads(learner) and (taken := [n for n in names if n.startswith(HEAD)]):
        raise InputError(
            f"{kind} has a parameter '{taken[0]}', and a learner that makes heads keeps its own under "
            f"'{HEAD}'; call that module otherwise"
        )
    if next(model.parameters(), None) is None:
        raise InputError(f"{kind} has no parameters: there is nothing to adapt")
    if not meta:
        raise InputError(
            f"no parameter of {kind} requires gradients: there is nothing to adapt; unfreeze those "
            "that should, with requires_grad_()"
        )
    with swapping:
        _refuse_hooks(model, meta)
    return meta


_looked_at: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""The hooks of a model's parameters that left a gradient as it was."""


def _refuse_hooks(model: nn.Module, meta: Params) -> None:
    """Refuse gradient hooks on parameters, which would not see what is computed at tensors in their place.

    One that only looks on, as loggers register, is called once, with made-up numbers, and then left out.

    Raises:
        InputError: a hook changes the gradient, or fails on these numbers.
    """
    known = _looked_at.setdefault(model, set())
    for name, parameter in model.named_parameters():
        hooks: dict[int, Any] = getattr(parameter, "_backward_hooks", None) or {}
        if name in meta and not hooks.keys() <= known:
            if not all(map(_looks_on, hooks.values(), itertools.repeat(parameter))):
                raise InputError(_of_hook(model, name, "register_hook"))
            known.update(hooks)


def _refuse_later(model: nn.Module, meta: Params) -> None:
    """Refuse hooks on accumulated gradients, as nothing is accumulated."""
    for name, parameter in model.named_parameters():
        if name in meta and getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise InputError(_of_hook(model, name, "register_post_accumulate_grad_hook"))


def _looks_on(hook: Any, parameter: Tensor) -> bool:
    """Whether a hook leaves gradients of both signs, from 0.001 to 1,000, as they are."""
    size = torch.logspace(3, -3, parameter.numel(), dtype=torch.float32)
    size[1::2] *= -1
    given = size.to(parameter.device, parameter.dtype).view(parameter.shape)
    before = given.clone()
    try:
        found = hook(given)
    except Exception:  # of what else it wants, nothing is known
        return False
    return torch.equal(given, before) and (found is None or torch.equal(found, before))


def _of_hook(model: nn.Module, name: str, kind: str) -> str:
    return (
        f"the parameter '{name}' of {type(model).__name__} has a gradient hook ({kind}). Meta-gradients and inner "
        "steps are computed at other tensors, which it would not see, and whether inner steps should go through it "
        "nothing says: remove it, and mask or scale in the forward instead, as torch.nn.utils.prune does"
    )


def require_instance(learner: Any) -> None:
    """Raise an `InputError` for a class, a name or another thing in the place of a learner."""
    if isinstance(learner, type):
        raise InputError(
            f"learner {learner.__name__} is a class; pass an instance, such as "
            f"{learner.__name__}(inner_lr=0.01, steps=5)"
        )
    if not hasattr(learner, "meta_parameters"):
        raise InputError(
            f"a {type(learner).__name__} is no learner; pass one, such as MAML(inner_lr=0.01, steps=5)"
        )


def _nothing(meta: Params) -> Tensor:
    """``(0,)``, in the precision and on the device of the rows."""
    dtype = functools.reduce(torch.promote_types, [p.dtype for p in meta.values()])
    return next(iter(meta.values())).new_empty(0, dtype=dtype)


@contextlib.contextmanager
def explained(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Say what to do where PyTorch cannot: inputs of another type, or an operation to differentiate twice."""
    try:
        yield
    except RuntimeError as error:
        _of_types(model, inputs, error)
        missing = re.search(r"derivative for '?(?:aten::)?_?(\w+)_backward'? is not", str(error))
        if missing is None:
            raise
        raise InputError(
            f"PyTorch has no second derivative of {missing[1]}, which the model or the loss uses; "
            "use first order (`learner` fomaml, MAML(first_order=True)), or replace that "
            "operation"
        ) from error


_TYPES = re.compile(
    r"\bm(at)?1 and m(at)?2\b.* same dtype|^Input type .* should be the same|^expected scalar type"
)
"""What a layer says of inputs of another type than its weights."""


def _of_types(model: nn.Module, inputs: Tensor, error: RuntimeError) -> None:
    """Raise an `InputError` where a forward failed because its inputs are not of the parameters' type."""
    if "argument #1 'indices' to have" in str(error) and not inputs.is_floating_point():
        raise InputError(
            f"the inputs are {str(inputs.dtype).removeprefix('torch.')}, and {type(model).__name__} looks them up in "
            f"an embedding ({summary(error)}); make them int64, by x.to(torch.int64)"
        ) from error
    with swapping:
        types = {p.dtype for p in model.parameters() if p.is_floating_point()}
        tokens = any(isinstance(module, nn.Embedding) for module in model.modules())
    if tokens and not inputs.is_floating_point():  # as they should be; it is something else
        return
    if len(types) != 1 or inputs.dtype in types or not _TYPES.search(str(error)):
        return
    wanted, got = (str(t).removeprefix("torch.") for t in (types.pop(), inputs.dtype))
    raise InputError(
        f"the inputs are {got}, and {type(model).__name__} computes in {wanted} ({summary(error)}); make them "
        f"{wanted}, by x.to(torch.{wanted})"
    ) from error


_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Losses by name for which a model's scores were looked at, and found wanting or not."""


def finite_scores(
    model: nn.Module, loss: Loss, function: object, value: Tensor, points: Tensor
) -> Tensor:
    """``points (T,)``, NaN where ``value (T,)``, the loss, is not finite.

    Warns the caller's caller if they are NaN for want of a default score, once a model and loss.
    """
    finite, name = torch.isfinite(value), name_of(loss)
    if function is default_score and loss is not default_loss:
        told = _told.setdefault(model, set())
        if name not in told:
            wanting = bool((finite & torch.isnan(points)).any())
            # once is enough where a look holds up the device
            if wanting or (points.device.type != "cpu" and bool(finite.any())):
                told.add(name)
            if wanting:
                warnings.warn(
                    f"gametalearn: scores of {type(model).__name__} are NaN: {no_default(loss)}",
                    stacklevel=3,
                )
    return torch.where(finite, points, float("nan"))
