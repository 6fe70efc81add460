"""Steps from a point: along a scaled update, or through a copy of an optimiser and its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gametalearn.adaptation import Params
from gametalearn.errors import InputError
from gametalearn.update import apply_update, clip

__all__ = ["Step", "along", "through"]

Step = Callable[[Params, Tensor], Params]
"""``step(meta, update)``: the meta-parameters after an update ``(P,)``; neither argument is changed."""


def along(meta: Params, update: Tensor, factor: float) -> Params:
    """theta - factor * update, for meta-parameters theta in their order."""
    parts = torch.split(update, [p.numel() for p in meta.values()])
    return {
        name: p.detach() - factor * part.view_as(p).to(p)
        for (name, p), part in zip(meta.items(), parts, strict=True)
    }


def through(
    optimizer: torch.optim.Optimizer,
    *,
    lr: float | None = None,
    clip_value: float | None = None,
    clip_norm: float | None = None,
) -> Step:
    """The step that an optimiser would take from its current state; the optimiser itself takes none.

    Args:
        optimizer: holds the very tensors that are passed to the step as ``meta``.
        lr: the rate; None keeps the optimiser's own.
        clip_value, clip_norm: clip the update before the step, as in training; None does not.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def step(meta: Params, update: Tensor) -> Params:
        if not held >= {id(p) for p in meta.values()}:
            raise InputError(
                "the optimiser holds other tensors than the meta-parameters; make it from "
                "model.parameters(), or from the values of `meta`"
            )
        copies = {name: nn.Parameter(p.detach().clone()) for name, p in meta.items()}
        memo: dict[int, Any] = {id(p): copies[name] for name, p in meta.items()}
        own = copy.deepcopy(optimizer, memo)
        apply_update(own, list(copies.values()), clip(update, clip_value, clip_norm), lr)
        return {name: p.detach() for name, p in copies.items()}

    return step
