"""Whether a query's prediction depends on the other queries, and how to have it either way.

Types are looked at, and then the predictions themselves; names of attributes are not. Only the
library's own models can be switched between batch and support statistics, by ``norm``.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from gametalearn.adaptation import Learner, Params
from gametalearn.engine.loop import first_order
from gametalearn.engine.task import fixed_tensors, predict, support_loss, swapping
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError
from gametalearn.losses import Loss
from gametalearn.models import MLP, Conv4, ResNet12, TaskNorm, _Backbone, _ConvBlock, _ResBlock
from gametalearn.peek import own_parameters, undisturbed
from gametalearn.trees import mapped

__all__ = [
    "Protocol",
    "check_statistics",
    "depends_on_queries",
    "protocol_of",
    "switchable",
    "under",
]

Protocol = Literal["transductive", "inductive", "query-at-a-time"]
"""How a query is predicted:

- ``"transductive"``: in one batch with the episode's other queries, by whose statistics it is
  normalised too: MAML's published numbers.
- ``"inductive"``: normalised by the support set's statistics alone; other queries have no part.
- ``"query-at-a-time"``: in a batch of the support set and this one query, so that it cannot depend
  on the others whatever the module does: Reptile's published non-transductive numbers.
"""

_OURS = (
    *(Conv4, ResNet12, MLP, TaskNorm, _ConvBlock, _ResBlock),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Identity, nn.ModuleList),
)


def protocol_of(model: nn.Module) -> Protocol:
    """What the types of a model's modules make of its queries.

    Batch normalisation by the statistics of the batch at hand (in training mode, or without running
    statistics) makes it transductive; of the library's own models, ``norm`` says. What a forward
    does besides cannot be seen here: `evaluate` measures it.
    """
    return "transductive" if _by_batch(model) else "inductive"


def _by_batch(model: nn.Module) -> str:
    """The module that normalises by the batch, for a message; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            by_batch = module.training or module.running_mean is None
        elif isinstance(module, TaskNorm):
            if isinstance(model, _Backbone):
                by_batch = not model.uses_support
            else:  # with the support set at hand, it may go by that
                by_batch = not getattr(model, "uses_support", False)
        else:
            continue
        if by_batch:
            return f"{type(module).__name__} '{name}'" if name else type(module).__name__
    return ""


def check_statistics(model: nn.Module) -> None:
    """Refuse running statistics that were never estimated: they normalise nothing.

    Raises:
        InputError: a module in eval mode has the mean 0 and the variance 1 that it began with.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase) or module.training or module.running_mean is None:
            continue
        mean, var, count = module.running_mean, module.running_var, module.num_batches_tracked
        if var is None or (count is not None and int(count) > 0):
            continue
        if bool((mean == 0).all()) and bool((var == 1).all()):
            raise InputError(
                f"evaluate: {type(module).__name__} '{name}' of {type(model).__name__} is in eval "
                "mode, and its running statistics are still the mean 0 and the variance 1 that it "
                "began with (meta-training leaves them alone), so accuracy would be at chance; "
                "call model.train() for the statistics of the batch at hand, or first estimate "
                "them: run some inputs through the model in training mode"
            )


def under(
    model: nn.Module,
    protocol: Protocol | None,
    meta: Params,
    task: TaskBatch,
    learner: Learner,
    loss: Loss,
) -> tuple[nn.Module, Protocol]:
    """A model that predicts by a protocol, and which one it is.

    Args:
        model: is not changed; what is returned shares its parameters and buffers.
        protocol: the one that is wanted; None takes the model as it is.
        meta, task, learner, loss: with which `depends_on_queries` is found out, where types do not
            settle it.

    Raises:
        InputError: the model cannot predict so.
    """
    if protocol == "query-at-a-time":
        alone = _ours(model) and (not _by_batch(model))
        return (model if alone else _QueryAtATime(model)), protocol  # else faster together
    tested = model if protocol is None else _switched(model, protocol)
    found, why = protocol_of(tested), _by_batch(tested)
    if (
        found == "inductive"
        and not _ours(tested)
        and depends_on_queries(tested, meta, task, learner, loss)
    ):
        found, why = "transductive", "its predictions change with the queries beside them"
    if protocol not in (None, found):
        kind = type(model).__name__
        if found == "inductive":
            raise InputError(
                f"evaluate: protocol '{protocol}' asked, but {kind} knows only 'inductive': a "
                "query's prediction does not depend on the others; leave protocol out"
            )
        raise InputError(
            f"evaluate: protocol '{protocol}' asked, but {kind} knows only 'transductive' ({why}); "
            "leave protocol out, or take 'query-at-a-time', which any model knows"
        )
    return tested, found


def depends_on_queries(
    model: nn.Module, meta: Params, task: TaskBatch, learner: Learner, loss: Loss
) -> bool:
    """Whether the first task's queries are predicted otherwise beside others than together.

    Two halves are compared with the whole, under the initial parameters and (a gate may start at
    zero) those adapted to the task; in float64 where the model can compute in it. False where two
    equal calls differ, since a forward that draws random numbers cannot be measured so.
    """
    x, support_x = task.query_x[0], task.support_x[0]
    if len(x) < 2:
        return False
    with undisturbed(x.device), torch.inference_mode(False), torch.no_grad(), swapping:
        initial = own_parameters(model, meta)
        x, support_x = x.clone(), support_x.clone()
        if _differs(model, initial, x, support_x):
            return True
        support_y, fixed = task.support_y[0].clone(), fixed_tensors(model)
        support = support_loss(model, loss, fixed, support_x, support_y)
        start = {n: p.detach().clone() for n, p in meta.items()}
        adapted = learner.for_test(learner.steps).adapt(start, support, first_order)
        return _differs(model, own_parameters(model, adapted), x, support_x)


def _differs(model: nn.Module, params: Params, x: Tensor, support_x: Tensor) -> bool:
    fixed = fixed_tensors(model)
    try:  # rounding is far from anything else there
        params64, fixed64 = ({n: _wide(t) for n, t in part.items()} for part in (params, fixed))
        return _halves_differ(model, params64, fixed64, _wide(x), _wide(support_x), 1e-6)
    except Exception:  # a forward may insist on its own precision
        pass
    dtypes = [p.dtype for p in params.values() if p.is_floating_point()] or [torch.float32]
    limit = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    predict(model, params, x, support_x, fixed)  # its own errors are for the caller
    try:
        return _halves_differ(model, params, fixed, x, support_x, limit)
    except Exception:
        return True  # a part of the queries cannot do without the others


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _halves_differ(
    model: nn.Module, params: Params, fixed: Params, x: Tensor, support_x: Tensor, limit: float
) -> bool:
    def outputs(x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        mapped(found.append, predict(model, params, x, support_x, fixed))
        return [t.detach() for t in found if t.shape[:1] == x.shape[:1]]

    together = outputs(x)
    if any(_far(a, b, limit) for a, b in zip(together, outputs(x), strict=True)):
        return False
    return any(
        _far(whole[start::2], half, limit)
        for start in (0, 1)
        for whole, half in zip(together, outputs(x[start::2]), strict=True)
    )


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


def _ours(model: nn.Module) -> bool:
    """Whether nothing in a model is the user's own: then types tell all."""
    return type(model) in (Conv4, ResNet12, MLP) and all(
        type(m) in _OURS and not m._forward_hooks and not m._forward_pre_hooks
        for m in model.modules()
    )


def switchable(model: nn.Module) -> bool:
    """Whether a model normalises by batch or support statistics, as its ``norm`` says."""
    own = isinstance(model, _Backbone) and type(model).forward is _Backbone.forward
    return own and model.norm in ("batch", "support")


def _switched(model: nn.Module, protocol: Protocol) -> nn.Module:
    """The model itself, or a view of its parameters whose statistics are those of ``protocol``."""
    if not switchable(model):
        return model
    view = copy.copy(model)
    view.norm = "support" if protocol == "inductive" else "batch"  # type: ignore[assignment]
    return view


class _QueryAtATime(nn.Module):
    """``model``, each query predicted from the support set and itself; parameters by the same names.

    It holds the model's own dictionaries of parameters, buffers and modules, so that whoever puts
    others in their place here does so there. Hooks, parametrizations and whatever else the class or
    the instance does are the model's, which is called; ``weight_norm`` and the like of any of its
    modules, itself included, find the tensors that were put in.
    """

    uses_support = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = model._parameters, model._buffers
        self._modules = model._modules
        self.wrapped = (model,)  # in a tuple, lest it become a submodule and lend its name

    def forward(self, x: Tensor, support_x: Tensor | None = None) -> Any:
        (model,) = self.wrapped
        if support_x is None:
            return model(x)
        queries = x.chunk(len(x))
        if getattr(model, "uses_support", False):
            return _joined([model(query, support_x) for query in queries], 1)
        return _joined(
            [model(torch.cat([support_x, query])) for query in queries], len(support_x) + 1
        )


def _joined(outputs: list[Any], batch: int) -> Any:
    """The last example of each output ``(batch, ...)``, one after the other, in any container."""

    def last(*parts: Tensor) -> Tensor:
        one_each = parts[0].shape[:1] == (batch,)
        return torch.cat([part[-1:] for part in parts]) if one_each else parts[0]

    return mapped(last, *outputs)
