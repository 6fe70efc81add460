"""Learners: what happens in the inner loop, as pure functions of dictionaries of parameters.

A learner never sees a model or data. It is handed the meta-parameters, the support loss as a
function of parameters, and a `Gradient` that differentiates it; the engine decides whether that is
autograd or `torch.func`, one task or all of them under ``vmap``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn.errors import InputError

__all__ = ["ANIL", "MAML", "Learner", "MetaSGD", "Reptile", "default_loss", "default_score"]

Params = dict[str, Tensor]
LossFn = Callable[[Params], Tensor]
Gradient = Callable[[LossFn, Params], Params]
"""``gradient(loss, params)``: the derivative of ``loss(params)``, zeros where it has none."""

RATE = "inner_lr."
"""Prefix under which learned inner rates stand among the meta-parameters."""


class Learner(Protocol):
    """An inner loop. Learners are small frozen dataclasses; they hold settings, never tensors."""

    @property
    def steps(self) -> int:
        """Inner steps."""
        ...

    @property
    def first_order(self) -> bool:
        """Whether rows ignore second derivatives."""
        ...

    @property
    def update_is_row(self) -> bool:
        """Whether a task's row is its inner update (Reptile), not the query loss's derivative."""
        ...

    def meta_parameters(self, params: Params) -> Params:
        """Initial meta-parameters for a model's: the same, and learned rates after them."""
        ...

    def adapt(self, meta: Params, loss: LossFn, gradient: Gradient) -> Params:
        """The parameters after the inner loop on one task's support loss."""
        ...

    def for_test(self, steps: int) -> Self:
        """The same inner loop with ``steps`` steps and no second-order graph."""
        ...


def _check(name: str, inner_lr: float, steps: int) -> None:
    if not inner_lr > 0:
        raise InputError(f"{name}: inner_lr must be positive, got {inner_lr}")
    if steps < 0:
        raise InputError(f"{name}: steps must not be negative, got {steps}")


def _descend(params: Params, grads: Params, rate: float) -> Params:
    return {n: p - rate * grads[n] if n in grads else p for n, p in params.items()}


@dataclass(frozen=True)
class MAML:
    """Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400, algorithm 1).

    theta_i = theta - inner_lr * grad L_i(theta), ``steps`` times, L_i the *mean* support loss; the
    row is the derivative of the query loss at theta_i with respect to theta.

    Args:
        inner_lr: multiplies a mean loss (MAML's code sums over ways: its 0.4 is 2.0 here).
        steps: inner gradient steps.
        first_order: FOMAML; treats the inner gradients as constants.
    """

    inner_lr: float = 0.4
    steps: int = 1
    first_order: bool = False
    update_is_row = False

    def __post_init__(self) -> None:
        _check("MAML", self.inner_lr, self.steps)

    def meta_parameters(self, params: Params) -> Params:
        """The model's own."""
        return params

    def adapt(self, meta: Params, loss: LossFn, gradient: Gradient) -> Params:
        """``steps`` steps of gradient descent on every parameter."""
        for _ in range(self.steps):
            meta = _descend(meta, gradient(loss, meta), self.inner_lr)
        return meta

    def for_test(self, steps: int) -> Self:
        """The same with ``steps`` steps, first order."""
        return dataclasses.replace(self, steps=steps, first_order=True)


@dataclass(frozen=True)
class ANIL(MAML):
    """Almost no inner loop (Raghu et al. 2020, arXiv 1909.09157): only the head adapts.

    Args:
        inner_lr, steps, first_order: as in `MAML`.
        head: prefix of the names of the parameters that adapt.
    """

    head: str = "head."

    def adapt(self, meta: Params, loss: LossFn, gradient: Gradient) -> Params:
        """``steps`` steps of gradient descent on the head's parameters."""
        body = {n: p for n, p in meta.items() if not n.startswith(self.head)}
        head = {n: p for n, p in meta.items() if n.startswith(self.head)}
        if not head:
            raise InputError(
                f"ANIL: no parameter's name starts with head='{self.head}'; names are "
                f"{', '.join(list(body)[:6])}, ..."
            )
        for _ in range(self.steps):
            head = _descend(head, gradient(lambda h: loss({**body, **h}), head), self.inner_lr)
        return {n: head.get(n, p) for n, p in meta.items()}


@dataclass(frozen=True)
class MetaSGD(MAML):
    """Meta-SGD (Li et al. 2017, arXiv 1707.09835): one learned inner rate a parameter.

    The rates are meta-parameters named ``inner_lr.NAME`` after the model's own, started at
    ``inner_lr``; they are kept by whoever trains (see `Learner.meta_parameters`).
    """

    def meta_parameters(self, params: Params) -> Params:
        """The model's own, then rates of the same shapes."""
        rates = {RATE + n: torch.full_like(p, self.inner_lr) for n, p in params.items()}
        return {**params, **rates}

    def adapt(self, meta: Params, loss: LossFn, gradient: Gradient) -> Params:
        """``steps`` steps, each parameter's gradient times its rate."""
        rates = {n.removeprefix(RATE): r for n, r in meta.items() if n.startswith(RATE)}
        params = {n: p for n, p in meta.items() if not n.startswith(RATE)}
        if not rates:
            raise InputError("MetaSGD: no learned rates among the meta-parameters")
        for _ in range(self.steps):
            grads = gradient(loss, params)
            params = {n: p - rates[n] * grads[n] for n, p in params.items()}
        return params


@dataclass(frozen=True)
class Reptile:
    """Reptile (Nichol et al. 2018, arXiv 1803.02999): the row is the update theta - theta_i.

    Args:
        inner_lr: the inner optimiser's rate.
        steps: inner steps on the support set.
        optimizer: ``"sgd"``, or ``"adam"`` with beta1 = 0, beta2 = 0.999 as in the paper's code.
    """

    inner_lr: float = 1e-3
    steps: int = 5
    optimizer: Literal["sgd", "adam"] = "sgd"
    first_order = True
    update_is_row = True

    def __post_init__(self) -> None:
        _check("Reptile", self.inner_lr, self.steps)
        if self.optimizer not in ("sgd", "adam"):
            raise InputError(f"Reptile: optimizer must be 'sgd' or 'adam', got '{self.optimizer}'")

    def meta_parameters(self, params: Params) -> Params:
        """The model's own."""
        return params

    def adapt(self, meta: Params, loss: LossFn, gradient: Gradient) -> Params:
        """``steps`` steps of the inner optimiser, from fresh moments."""
        square = {n: torch.zeros_like(p) for n, p in meta.items()}
        for step in range(1, self.steps + 1):
            grads = gradient(loss, meta)
            if self.optimizer == "adam":
                square = {n: 0.999 * v + 0.001 * grads[n] ** 2 for n, v in square.items()}
                scale = 1 - 0.999**step
                grads = {n: g / ((square[n] / scale).sqrt() + 1e-8) for n, g in grads.items()}
            meta = _descend(meta, grads, self.inner_lr)
        return meta

    def for_test(self, steps: int) -> Self:
        """The same with ``steps`` steps."""
        return dataclasses.replace(self, steps=steps)


def default_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy for integer targets ``(B,)``, mean squared error for float ``(B, *y)``."""
    if target.is_floating_point():
        return F.mse_loss(prediction, target)
    return F.cross_entropy(prediction, target)


def default_score(prediction: Tensor, target: Tensor) -> Tensor:
    """Accuracy in [0, 1] for integer targets, mean squared error for float ones."""
    if target.is_floating_point():
        return F.mse_loss(prediction, target)
    return (prediction.argmax(-1) == target).to(prediction.dtype).mean()


def model_parameters(model: nn.Module) -> Params:
    """The parameters that require gradients, in ``named_parameters()`` order, tied ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
