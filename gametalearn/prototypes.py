"""Learners that make a task's head from its support set: prototypical networks and Proto-MAML.

The model is the embedding: a module from ``(B, *x)`` to features ``(B, *f)``, without an output per
class, such as ``Conv4(ways=None)``. A new head is made for each task, so the number of ways
may vary from one test to the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gametalearn.adaptation import MAML, Gradient, Params, SupportLoss
from gametalearn.errors import InputError

__all__ = ["ProtoMAML", "ProtoNet", "prototypes"]


def prototypes(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """The mean support feature of each class: Snell et al. 2017, equation 1.

    Args:
        features: ``(S, *f)``, flattened to ``(S, F)``.
        labels: ``(S,)`` int64 in ``[0, ways)``.
        ways: classes N.

    Returns:
        ``(N, F)``; NaN for a class without a support example.

    Raises:
        InputError: the features are no tensor of two dimensions or more.
    """
    features = _flat(features)
    own = labels[:, None] == torch.arange(ways, device=labels.device)
    mask = own.to(features.dtype)
    return (mask.t() @ features) / mask.sum(0)[:, None]


def _flat(features: Tensor) -> Tensor:
    """``(B, F)``."""
    if not isinstance(features, Tensor) or features.ndim < 2:
        tensor = isinstance(features, Tensor)
        got = f"shape {tuple(features.shape)}" if tensor else f"a {type(features).__name__}"
        raise InputError(
            "a learner that makes heads takes the model's outputs as features, a tensor of examples x features; "
            f"got {got}; let the model return its last layer's input alone"
        )
    return features.flatten(1)


@dataclass(frozen=True)
class ProtoMAML(MAML):
    """Proto-MAML (Triantafillou et al. 2020, arXiv 1903.03096, section 3): MAML from a head of prototypes.

    With the prototypes c_k of the support features, the head starts as the linear layer that computes
    the negative squared distance to them, W_k = 2 c_k and b_k = -|c_k|^2, up to a constant that is the
    same for all classes. Head and embedding then take ``steps`` inner steps together. The row
    differentiates through the prototypes as well, even with ``first_order``.

    Args:
        inner_lr, steps, first_order, step_weights: as in `MAML`.
        ways: classes; `gametalearn.meta_gradients` and the like take them from each batch's support
            labels instead.
    """

    ways: int = field(default=0, kw_only=True)

    def for_ways(self, ways: int) -> Self:
        """The same for tasks of this many classes."""
        return dataclasses.replace(self, ways=ways)

    def head(self, features: Tensor, labels: Tensor) -> Params:
        """``weight (ways, F)`` and ``bias (ways,)`` from the support features."""
        centre = prototypes(features, labels, self.ways)
        return {"weight": 2 * centre, "bias": -centre.square().sum(1)}

    def predict(self, head: Params, features: Tensor) -> Tensor:
        """Logits ``(B, ways)``."""
        return F.linear(_flat(features), head["weight"], head["bias"])


@dataclass(frozen=True)
class ProtoNet(ProtoMAML):
    """Prototypical networks (Snell et al. 2017, arXiv 1703.05175): only the prototypes adapt.

    A query's logits are -|f(x) - c_k|^2 + |f(x)|^2 = 2 <f(x), c_k> - |c_k|^2, which have the same
    probabilities, cross-entropy and derivatives as the paper's -|f(x) - c_k|^2: it is
    Proto-MAML without an inner step. ``updates`` are zero.
    """

    inner_lr: float = field(default=1.0, init=False, repr=False)
    steps: int = field(default=0, init=False, repr=False)
    first_order: bool = field(default=True, init=False, repr=False)
    step_weights: tuple[float, ...] = field(default=(), init=False, repr=False)

    def path(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Iterator[Params]:
        """The parameters, as they are."""
        yield meta

    def for_test(self, steps: int) -> Self:
        """The same learner: there are no steps to take."""
        return self
