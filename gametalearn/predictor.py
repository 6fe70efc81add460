"""A model that no longer normalises by what it is given: its support set's statistics in buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gametalearn.adaptation import Params, model_parameters
from gametalearn.copies import copied
from gametalearn.dependence import differs
from gametalearn.engine.task import predict, swapping
from gametalearn.errors import InputError
from gametalearn.frozen import freeze, set_statistics
from gametalearn.models import TaskNorm, _Backbone
from gametalearn.normalisation import by_batch, ours
from gametalearn.randomness import undisturbed

__all__ = ["WithHead", "bake"]

_ADVICE = "pass protocol='transductive' for a copy that goes on normalising by what it is given"

EXAMPLES = 4
"""The number of predictions tested for dependence on each other."""
Statistics = tuple[Tensor, Tensor]
"""``mean (C,), var (C,)``."""


class WithHead(nn.Module):
    """An embedding and the head that a learner made of one support set; ``(B, *x)`` to predictions.

    Its ``state_dict`` has ``embedding.*`` and ``head.*``: of `gametalearn.prototypes` the head is that
    of an `nn.Linear` behind flattened features.
    """

    def __init__(self, embedding: nn.Module, learner: Any, head: Params) -> None:
        super().__init__()
        self.embedding, self._predict = embedding, learner.predict
        self.head = nn.ParameterDict({name: value.detach() for name, value in head.items()})

    def forward(self, x: Tensor) -> Any:
        """The prediction for each input."""
        return self._predict(dict(self.head.items()), self.embedding(x))


def bake(model: nn.Module, support_x: Tensor) -> None:
    """Let a model normalise by the statistics of ``support_x`` from now on, whatever it is given.

    Each batch normalisation that goes by the batch at hand takes the mean and the biased variance of
    its own input for its running statistics, one layer after the other, those before it normalised
    so already; then it stays in eval mode, as do those that are in it now. The library's `TaskNorm`
    becomes `torch.nn.BatchNorm2d`.

    Args:
        model: is changed; it has the weights that it shall predict with.
        support_x: ``(S, *x)`` on its device, S at least 1.

    Raises:
        InputError: its predictions would still depend on each other, or a layer runs several times.
    """
    for module in model.modules():
        if type(module) is TaskNorm:
            _as_batch_norm(module)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    device = support_x.device
    with swapping, undisturbed(device), torch.inference_mode(False), torch.no_grad():
        own = [name for name, layer in layers.items() if _goes_by_batch(layer)]
        if own:  # a copy runs: what a forward writes down stays there
            for name, (mean, var) in _statistics(copied(model), own, support_x).items():
                set_statistics(layers[name], mean, var)
        for layer in layers.values():
            if not _goes_by_batch(layer):  # one that has not run is left alone
                freeze(layer)
        for module in model.modules():
            if isinstance(module, _Backbone) and not by_batch(module):
                module.statistics_are_fixed()
        if not ours(model):
            _check(model, copied(model), support_x)


def _as_batch_norm(module: Any) -> None:
    """Make a `TaskNorm` a batch normalisation without running statistics, wherever it is registered."""
    module.num_features, module.momentum = len(module.weight), 0.1
    module.affine, module.track_running_stats = True, False
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        module.register_buffer(name, None)
    module.__class__ = nn.BatchNorm2d


def _goes_by_batch(layer: _BatchNorm) -> bool:
    return layer.training or layer.running_mean is None


def _statistics(model: nn.Module, names: list[str], support_x: Tensor) -> dict[str, Statistics]:
    """The statistics of the named layers' inputs, of those that run; the model is changed."""
    if not len(support_x):
        raise InputError("adapt: the support set is empty, and there is nothing to normalise by")
    found: dict[str, Statistics] = {}

    def taking(name: str) -> Any:
        def take(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in found:
                raise InputError(
                    f"adapt: {type(layer).__name__} '{name}' runs several times in a forward of "
                    f"{type(model).__name__}, with other statistics each time, and has room for one; "
                    f"use a layer for each place, or {_ADVICE}"
                )
            found[name] = _moments(args[0] if args else kwargs["input"], layer)
            set_statistics(layer, *found[name])

        return take

    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(taking(name), with_kwargs=True)
    predict(model, model_parameters(model), support_x, None)
    return found


def _moments(x: Tensor, layer: _BatchNorm) -> Statistics:
    """Mean and biased variance of each feature, as training mode takes them."""
    of = [t for t in (layer.running_mean, layer.weight) if t is not None]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    var, mean = torch.var_mean(wide, dim=[d for d in range(x.ndim) if d != 1], correction=0)
    dtype = of[0].dtype if of else x.dtype
    return mean.to(dtype), var.to(dtype)


def _check(model: nn.Module, probe: nn.Module, support_x: Tensor) -> None:
    """Refuse a model whose predictions depend on each other all the same.

    Args:
        model: as it is, and in eval mode, where dropout no longer hides what other inputs do.
        probe: a copy, to be run.
        support_x: of which up to ``EXAMPLES`` are predicted.
    """
    x = support_x[:: -(-len(support_x) // EXAMPLES)]
    if len(x) == 1:  # a second example, unlike the first
        x = torch.cat([x, x / 2 + 0.5 if x.is_floating_point() else torch.zeros_like(x)])
    params = {name: p.detach() for name, p in model_parameters(probe).items()}
    failed = None
    try:
        found = differs(probe, params, x, support_x)
        if not found and any(module.training for module in probe.modules()):
            found = differs(probe.eval(), params, x, support_x)
    except Exception as error:  # it cannot do without the other inputs
        found, failed = True, error
    if found:
        kind, layer = type(model).__name__, by_batch(model)
        why = f"its {layer}" if layer else "something in its forward that is no batch norm layer"
        raise InputError(
            f"adapt: predictions of {kind} depend on the inputs beside them, by {why}; statistics of "
            f"the support set cannot be put in its place: {_ADVICE}"
        ) from failed
