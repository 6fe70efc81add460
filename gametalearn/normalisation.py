"""How a query is normalised: an argument of each prediction, and what types tell about a model.

Types are looked at here, never the names of attributes; `gametalearn.dependence` looks at the
predictions themselves. Only the library's own models predict by the batch's and by the support set's
statistics alike, as the call says.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from gametalearn.errors import InputError
from gametalearn.frozen import Frozen, frozen_class
from gametalearn.models import MLP, Conv4, ResNet12, TaskNorm, _Backbone, _ConvBlock, _ResBlock

__all__ = [
    "Protocol",
    "by_batch",
    "check_protocol",
    "check_statistics",
    "ours",
    "protocol_of",
    "refusal",
    "switchable",
    "way_of",
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
    frozen_class(nn.BatchNorm2d),
)


def protocol_of(model: nn.Module) -> Protocol:
    """What the types of a model's modules make of its queries, left to itself.

    Batch normalisation by the statistics of the batch at hand (in training mode, or without running
    statistics) makes it transductive; of the library's own models, ``norm`` says. What a forward
    does besides cannot be seen here: `evaluate` measures it.
    """
    return "transductive" if by_batch(model) else "inductive"


def by_batch(model: nn.Module, protocol: Protocol | None = None) -> str:
    """The module that normalises by the batch under a protocol, for a message; empty if none does."""
    if protocol in ("transductive", "inductive") and switchable(model):
        by_support = protocol == "inductive"
    else:  # with the support set at hand, a norm of ours may go by that
        by_support = getattr(model, "uses_support", False)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            found = module.training or module.running_mean is None
        else:
            found = isinstance(module, TaskNorm) and not by_support
        if found:
            return f"{type(module).__name__} '{name}'" if name else type(module).__name__
    return ""


def ours(model: nn.Module) -> bool:
    """Whether nothing in a model is the user's own: then types tell all."""
    return type(model) in (Conv4, ResNet12, MLP) and all(
        type(m) in _OURS and not m._forward_hooks and not m._forward_pre_hooks
        for m in model.modules()
    )


def switchable(model: nn.Module) -> bool:
    """Whether a model normalises by the batch or by the support set, as its call says."""
    own = isinstance(model, _Backbone) and type(model).forward is _Backbone.forward
    return own and model.norm in ("batch", "support")


def way_of(model: nn.Module, protocol: Protocol | None) -> Protocol | None:
    """The protocol by which a model has to be called; None where it predicts so by itself.

    - ``"transductive"``: ``model(x)``, although it would use the support set.
    - ``"inductive"``: ``model(x, support_x)``, although it would not.
    - ``"query-at-a-time"``: once for each query. A model that is known not to look at other queries
      predicts all at once, which is faster.
    """
    if protocol is None or (protocol == "query-at-a-time" and ours(model) and not by_batch(model)):
        return None
    if protocol == "query-at-a-time":
        return protocol
    by_itself = getattr(model, "uses_support", False) == (protocol == "inductive")
    return protocol if switchable(model) and not by_itself else None


def check_protocol(model: nn.Module, protocol: Protocol | None) -> None:
    """Refuse a protocol that a model cannot predict by, as far as types tell.

    Raises:
        InputError: there is no such protocol, or the model does not know it.
    """
    if protocol is None or protocol == "query-at-a-time":
        return
    if protocol not in get_args(Protocol):
        raise InputError(
            f"protocol must be one of {', '.join(get_args(Protocol))}, or None for what the model "
            f"does by itself; got {protocol!r}"
        )
    why = by_batch(model, protocol)
    if why and protocol == "inductive":
        raise refusal(model, protocol, why)
    if not why and protocol == "transductive" and ours(model):
        raise refusal(model, protocol, why)


def refusal(model: nn.Module, protocol: Protocol, why: str) -> InputError:
    """The error for a protocol that a model does not know.

    Args:
        model, protocol: the two.
        why: what makes it transductive; empty if it is inductive.
    """
    kind = type(model).__name__
    if not why:
        return InputError(
            f"protocol '{protocol}' requested, but {kind} supports only 'inductive': a query's prediction "
            "does not depend on the others; leave protocol out"
        )
    return InputError(
        f"protocol '{protocol}' requested, but {kind} supports only 'transductive' ({why}); leave protocol "
        "out, or use 'query-at-a-time', which any model supports"
    )


def statistics_of(model: nn.Module) -> set[str]:
    """The names of the buffers that hold running statistics of batch and instance norms."""
    return {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for buffer, _ in module.named_buffers(recurse=False)
    }


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
            if isinstance(module, Frozen):
                raise InputError(
                    f"evaluate: {type(module).__name__} '{name}' of {type(model).__name__} still has "
                    "the mean 0 and the variance 1 that it began with; load the state_dict of a model "
                    "that adapt has fitted, or take another norm"
                )
            raise InputError(
                f"evaluate: {type(module).__name__} '{name}' of {type(model).__name__} is in eval "
                "mode, and its running statistics are still the mean 0 and the variance 1 that it "
                "began with (meta-training leaves them alone), so accuracy would be at chance; "
                "call model.train() for the statistics of the batch at hand, or first estimate "
                "them: run some inputs through the model in training mode"
            )
