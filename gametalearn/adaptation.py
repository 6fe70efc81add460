"""Learners: what happens in the inner loop, as pure functions of dictionaries of parameters.

A learner never sees a model or data. It is handed the meta-parameters, the support loss as a
function of parameters, and a `Gradient` that differentiates it; the engine decides whether that is
autograd or `torch.func`, one task or all of them under ``vmap``.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError, require_whole
from gametalearn.losses import default_loss
from gametalearn.scores import default_score

__all__ = [
    "ANIL",
    "LSLR",
    "MAML",
    "Learner",
    "MetaSGD",
    "Reptile",
    "SupportLoss",
    "default_loss",
    "default_score",
]

Params = dict[str, Tensor]
LossFn = Callable[[Params], Tensor]
Gradient = Callable[[LossFn, Params], Params]
"""``gradient(loss, params)``: the derivative of ``loss(params)``, zeros where it has none."""

HEAD = "task_head."
"""Prefix under which the tensors of a task's own head stand among the adapted parameters."""

RATE = "inner_lr."
"""Prefix under which learned inner rates stand among the meta-parameters."""


class SupportLoss(Protocol):
    """The mean loss on a task's support set, or on a mini-batch of it."""

    def __call__(self, params: Params, first: int = 0, count: int | None = None) -> Tensor:
        """The loss on ``count`` examples from number ``first`` on, counted in a circle; on all."""
        ...


class Learner(Protocol):
    """An inner loop. Learners are small frozen dataclasses; they hold settings, never tensors.

    A learner may have ``step_weights``, one per step, and ``path(meta, loss, gradient)``, which yields
    the parameters before the first step and after each: rows then differentiate the query losses
    after all steps, so weighted (MAML++'s multi-step loss), not the last one alone. See `MAML`.

    A learner may also say how queries are predicted from a task's support set, by ``head(features,
    labels)``, a dictionary of tensors that it makes of the model's outputs for the support set, and
    ``predict(head, features)``, the prediction from those and the model's outputs. The head's tensors
    then adapt with the model's parameters, under names that begin with `HEAD`. ``for_ways(ways)`` gives
    the learner for tasks of this many classes. See `gametalearn.prototypes.ProtoMAML`.
    """

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

    def adapt(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Params:
        """The parameters after the inner loop on one task's support loss."""
        ...

    def for_test(self, steps: int) -> Self:
        """The same inner loop with ``steps`` steps and no second-order graph."""
        ...


L = TypeVar("L", bound=Learner)


def fitted(learner: L, support_y: Tensor) -> L:
    """The learner for tasks with these labels: one that makes heads gets the number of classes.

    Raises:
        InputError: it makes heads, and the targets are no labels from 0 on, each of which is there.
    """
    if not makes_heads(learner) or not support_y.numel():
        return learner
    if support_y.is_floating_point():
        raise InputError(
            f"{type(learner).__name__} builds a class's prototype from its support examples, but these "
            f"targets are not labels ({support_y.dtype}); take `learner` maml"
        )
    ways, least = int(support_y.max()) + 1, int(support_y.min())
    tasks = support_y.reshape(-1, support_y.shape[-1])
    if least < 0 or ways > tasks.shape[1] or not _labelled(tasks, ways):
        some = ", ".join(map(str, sorted(set(support_y.flatten().tolist()))[:8]))
        raise InputError(
            f"{type(learner).__name__} builds a prototype for each label from 0 on, of which every task "
            f"needs a support example; got the labels {some}; number the classes 0, 1, 2 and so on"
        )
    found: L = learner.for_ways(ways)  # type: ignore[attr-defined]
    return found


def _labelled(tasks: Tensor, ways: int) -> bool:
    """Whether each of the labels 0 to ways - 1 is in each row ``(T, S)``."""
    return bool((tasks[:, None] == torch.arange(ways, device=tasks.device)[:, None]).any(2).all())


def makes_heads(learner: object) -> bool:
    """Whether a learner, or a class of them, makes a head for each task out of its support set."""
    return callable(getattr(learner, "head", None))


def _check(name: str, inner_lr: float, steps: int) -> None:
    if not inner_lr > 0:
        raise InputError(f"{name}: inner_lr must be positive, got {inner_lr}")
    require_whole(f"{name}: steps", steps, 0)


def _descend(params: Params, grads: Params, rate: float) -> Params:
    return {n: p - rate * grads[n] if n in grads else p for n, p in params.items()}


def _rates(learner: MAML, meta: Params) -> tuple[Params, Params]:
    """The model's parameters, and the learned rates under the same names."""
    rates = {n.removeprefix(RATE): r for n, r in meta.items() if n.startswith(RATE)}
    if not rates:
        raise InputError(f"{type(learner).__name__}: no learned rates among the meta-parameters")
    return {n: p for n, p in meta.items() if not n.startswith(RATE)}, rates


@dataclass(frozen=True)
class MAML:
    """Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400, algorithm 1).

        theta_i <- theta_i - inner_lr * grad L_i(theta_i)

    ``steps`` times from theta_i = theta on, L_i the *mean* support loss; the row is the derivative of
    the query loss at theta_i with respect to theta.

    Args:
        inner_lr: multiplies a mean loss (MAML's code sums over ways: its 0.4 is 2.0 here).
        steps: inner gradient steps.
        first_order: FOMAML; treats the inner gradients as constants.
        step_weights: empty, or one weight v_j per step: the rows are then those of the multi-step loss
            sum_j v_j L_query(theta_i after step j) of MAML++ (Antoniou et al. 2019, arXiv
            1810.09502, equation 3). ``loss`` and ``score`` stay those after the last step.
    """

    inner_lr: float = 0.4
    steps: int = 1
    first_order: bool = False
    step_weights: tuple[float, ...] = field(default=(), kw_only=True)
    update_is_row = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check(name, self.inner_lr, self.steps)
        if self.step_weights and len(self.step_weights) != self.steps:
            raise InputError(
                f"{name}: step_weights needs one weight for each of {self.steps} steps, "
                f"got {len(self.step_weights)}"
            )

    def meta_parameters(self, params: Params) -> Params:
        """The model's own."""
        return params

    def path(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Iterator[Params]:
        """The parameters before the first step and after each: descent on every parameter."""
        yield meta
        for _ in range(self.steps):
            meta = _descend(meta, gradient(loss, meta), self.inner_lr)
            yield meta

    def adapt(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Params:
        """The end of `path`."""
        return deque(self.path(meta, loss, gradient), maxlen=1).pop()

    def for_test(self, steps: int) -> Self:
        """The same with ``steps`` steps, first order, and the last one's query loss."""
        return dataclasses.replace(self, steps=steps, first_order=True, step_weights=())


@dataclass(frozen=True)
class ANIL(MAML):
    """Almost no inner loop (Raghu et al. 2020, arXiv 1909.09157): only the head adapts.

    Args:
        inner_lr, steps, first_order: as in `MAML`.
        head: prefix of the names of the parameters that adapt.
    """

    head: str = "head."

    def path(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Iterator[Params]:
        """The parameters before the first step and after each: descent on the head's."""
        body = {n: p for n, p in meta.items() if not n.startswith(self.head)}
        head = {n: p for n, p in meta.items() if n.startswith(self.head)}
        if not head:
            raise InputError(
                f"ANIL: no parameter's name starts with head='{self.head}'; names are "
                f"{', '.join(list(body)[:6])}, ..."
            )
        yield meta
        for _ in range(self.steps):
            head = _descend(head, gradient(lambda h: loss({**body, **h}), head), self.inner_lr)
            yield {n: head.get(n, p) for n, p in meta.items()}


@dataclass(frozen=True)
class MetaSGD(MAML):
    """Meta-SGD (Li et al. 2017, arXiv 1707.09835): one learned inner rate per parameter.

    The rates are meta-parameters named ``inner_lr.NAME`` after the model's own, started at
    ``inner_lr``; they are kept by whoever trains (see `Learner.meta_parameters`).
    """

    def meta_parameters(self, params: Params) -> Params:
        """The model's own, then rates of the same shapes."""
        rates = {RATE + n: torch.full_like(p, self.inner_lr) for n, p in params.items()}
        return {**params, **rates}

    def path(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Iterator[Params]:
        """The parameters before the first step and after each: each gradient times its rate."""
        params, rates = _rates(self, meta)
        yield params
        for _ in range(self.steps):
            grads = gradient(loss, params)
            params = {n: p - rates[n] * grads[n] for n, p in params.items()}
            yield params


@dataclass(frozen=True)
class LSLR(MAML):
    """Learned per-layer per-step rates (LSLR of MAML++, Antoniou et al. 2019, section 4).

    theta <- theta - alpha[layer, j] * grad in step j; the rates of a parameter tensor are a
    meta-parameter ``inner_lr.NAME`` of shape ``(steps,)``, started at ``inner_lr``. Steps beyond
    those that were learned (more steps at test) use the last step's rate.
    """

    def meta_parameters(self, params: Params) -> Params:
        """The model's own, then one rate per parameter tensor and step."""
        shape = (max(1, self.steps),)
        rates = {RATE + n: p.new_full(shape, self.inner_lr) for n, p in params.items()}
        return {**params, **rates}

    def path(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Iterator[Params]:
        """The parameters before the first step and after each: each gradient times its rate."""
        params, rates = _rates(self, meta)
        yield params
        for step in range(self.steps):
            grads = gradient(loss, params)
            rate = {n: r[min(step, len(r) - 1)] for n, r in rates.items()}
            params = {n: p - rate[n] * grads[n] for n, p in params.items()}
            yield params


@dataclass(frozen=True)
class Reptile:
    """Reptile (Nichol et al. 2018, arXiv 1803.02999): the row is the update theta - theta_i.

    The paper's outer step theta + eps * mean_i (theta_i - theta) is then plain SGD on the mean row
    with rate eps; with gradient agreement, theta + eps * sum_i w_i (theta_i - theta).

    Where we differ from the paper's code: Adam's second moments start afresh with each task, while
    the code carries them from task to task, into the test too; and a mini-batch continues where
    the last one ended in one fixed order of the support set, while the code reshuffles after each
    pass (its training settings make one pass, and then the two are the same).

    Args:
        inner_lr: the inner optimiser's rate.
        steps: inner steps on the support set.
        optimizer: ``"sgd"``, or ``"adam"`` with beta1 = 0, beta2 = 0.999 as in the paper's code.
        batch: support examples per step, in their order, starting over after the last; 0, or more
            than there are, means all of them. Let the source shuffle them (`EpisodeSampler`'s ``shuffle_support``):
            otherwise they come class after class.
    """

    inner_lr: float = 1e-3
    steps: int = 5
    optimizer: Literal["sgd", "adam"] = "sgd"
    batch: int = 0
    first_order = True
    update_is_row = True

    def __post_init__(self) -> None:
        _check("Reptile", self.inner_lr, self.steps)
        if self.optimizer not in ("sgd", "adam"):
            raise InputError(f"Reptile: optimizer must be 'sgd' or 'adam', got '{self.optimizer}'")
        require_whole("Reptile: batch", self.batch, 0)

    def meta_parameters(self, params: Params) -> Params:
        """The model's own."""
        return params

    def adapt(self, meta: Params, loss: SupportLoss, gradient: Gradient) -> Params:
        """``steps`` steps of the inner optimiser, from fresh moments."""
        square = {n: torch.zeros_like(p) for n, p in meta.items()}
        for step in range(self.steps):
            grads = gradient(self._mini_batch(loss, step), meta)
            if self.optimizer == "adam":
                square = {n: 0.999 * v + 0.001 * grads[n] ** 2 for n, v in square.items()}
                scale = 1 - 0.999 ** (step + 1)
                grads = {n: g / ((square[n] / scale).sqrt() + 1e-8) for n, g in grads.items()}
            meta = _descend(meta, grads, self.inner_lr)
        return meta

    def _mini_batch(self, loss: SupportLoss, step: int) -> LossFn:
        if not self.batch:
            return loss
        return lambda params: loss(params, step * self.batch, self.batch)

    def for_test(self, steps: int) -> Self:
        """The same with ``steps`` steps."""
        return dataclasses.replace(self, steps=steps)


def model_parameters(model: nn.Module) -> Params:
    """The parameters that require gradients, in ``named_parameters()`` order, tied ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
