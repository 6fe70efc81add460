"""Batch normalisation by fixed statistics, which no call of ``train()`` undoes."""

from __future__ import annotations

import copy
import copyreg
import functools
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Frozen", "freeze", "frozen_class", "set_statistics"]


class Frozen(nn.Module):
    """What `frozen_class` puts before a class of batch normalisation: its layers stay in eval mode.

    Pickled, also within a model, they are layers of the class that they were, in eval mode: they are
    loaded where this library is not installed.
    """

    def train(self, mode: bool = True) -> Self:
        """Of the modules within it alone."""
        super().train(mode)
        self.training = False
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        kind = type(self).__mro__[2]
        return copyreg._reconstructor, (kind, object, None), self.__getstate__()  # type: ignore[attr-defined,no-untyped-call]

    def __copy__(self) -> Self:
        result = object.__new__(type(self))
        result.__dict__.update(self.__dict__)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result = memo[id(self)] = object.__new__(type(self))
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result


@functools.cache
def frozen_class(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """The same layer, but `Frozen`: ``FrozenBatchNorm2d`` of ``BatchNorm2d``."""
    return type(f"Frozen{kind.__name__}", (Frozen, kind), {"__module__": __name__})


def freeze(layer: _BatchNorm) -> None:
    """Keep a layer in eval mode, with the statistics that it has.

    >>> layer = nn.BatchNorm1d(3)
    >>> freeze(layer)
    >>> type(layer).__name__, layer.train().training, isinstance(layer, nn.BatchNorm1d)
    ('FrozenBatchNorm1d', False, True)
    """
    if not isinstance(layer, Frozen):
        layer.__class__ = frozen_class(type(layer))  # type: ignore[arg-type] # a class can be hashed
    layer.training = False


def set_statistics(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Let a layer normalise by ``mean (C,)`` and ``var (C,)``; it is in eval mode afterwards."""
    layer.running_mean, layer.running_var = mean, var
    layer.num_batches_tracked = torch.ones((), dtype=torch.int64, device=mean.device)
    layer.track_running_stats, layer.training = True, False
