"""The meta-update: combine rows by weights, clip, and hand the result to an optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError

__all__ = ["adam", "adamw", "apply_update", "clip", "combine", "meta_rate", "sgd"]


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights_i * rows_i``: rows ``(T, P)``, effective weights ``(T,)``, result ``(P,)``."""
    return weights @ rows


def clip(vector: Tensor, value: float | None = None, norm: float | None = None) -> Tensor:
    """Clip entries to ``[-value, value]``, then the length to ``norm``; None leaves as is."""
    if value is not None:
        vector = vector.clamp(-value, value)
    if norm is not None:
        length = torch.linalg.vector_norm(vector, dtype=torch.float64)  # squares may overflow
        vector = vector * (norm / length.clamp(min=1e-30)).clamp(max=1.0).to(vector.dtype)
    return vector


Named = Sequence[tuple[str, Tensor]]
"""Parameters with their names, as `torch.nn.Module.named_parameters` gives them."""


def adam(named_parameters: Named, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015), the usual outer optimiser; the decay is added to the gradient."""
    return torch.optim.Adam([p for _, p in named_parameters], lr=lr, weight_decay=weight_decay)


def adamw(named_parameters: Named, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW([p for _, p in named_parameters], lr=lr, weight_decay=weight_decay)


def sgd(named_parameters: Named, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD([p for _, p in named_parameters], lr=lr, weight_decay=weight_decay)


def meta_rate(
    lr: float, schedule: str, iteration: int, iterations: int, final: float = 0.0
) -> float:
    """The outer rate of meta-update ``iteration`` (from 0) of ``iterations``.

    ``constant``; ``linear`` decay to ``final`` (Reptile: from 1 to 0); ``cosine``, half a cosine
    from ``lr`` to ``final`` (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5, as in MAML++).

    >>> [meta_rate(1.0, "linear", t, 4) for t in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    done = iteration / iterations
    if schedule == "linear":
        return final + (lr - final) * (1 - done)
    if schedule == "cosine":
        return final + (lr - final) * (1 + math.cos(math.pi * done)) / 2
    return lr


def apply_update(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor] | Mapping[str, Tensor] | nn.Module,
    vector: Tensor,
    lr: float | None = None,
) -> None:
    """The meta-step: write a combined meta-gradient into ``.grad``, and let an optimiser step.

    ::

        gradients = meta_gradients(model, batch, learner)
        weights = GradientAgreement()(gradients)
        apply_update(optimizer, model, weights.effective @ gradients.rows)

    Args:
        optimizer: any; a closure is not passed.
        parameters: the tensors that the columns of `TaskGradients.rows` belong to, in their order: a
            model (those that require gradients), a run's ``meta``, or the tensors themselves.
        vector: ``(P,)``, such as ``weights @ rows``; it is cast to each parameter's precision.
        lr: the rate of every parameter group in this step; None leaves those that the optimiser has.

    Raises:
        InputError: ``vector`` has another size than the parameters together.
    """
    if isinstance(parameters, nn.Module):
        parameters = [p for p in parameters.parameters() if p.requires_grad]
    parameters = list(parameters.values() if isinstance(parameters, Mapping) else parameters)
    size = sum(p.numel() for p in parameters)
    if vector.shape != (size,):
        raise InputError(
            f"apply_update: the parameters have {size} numbers and the update has the shape "
            f"{tuple(vector.shape)}; it must be ({size},)"
        )
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr
    parts = torch.split(vector, [p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
    optimizer.step()
