"""Gradient agreement (Eshratifar, Eigen, Pedram 2018, arXiv 1810.08178)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.sharded import ShardedGradients
from gametalearn.weighting.vectors import Vectors, wide_type
from gametalearn.weighting.weights import (
    Gradients,
    Weights,
    as_rows,
    check_finite,
    check_gramian,
    largest_entries,
)

__all__ = [
    "ROUNDING",
    "GradientAgreement",
    "agreement_weights",
    "agreement_weights_from_gramian",
    "require_updates",
    "rounding",
    "sharded_agreement",
    "shares",
    "vanish",
]

ROUNDING = 4.0
"""c in: all s_k are zero up to rounding when sum |s| <= c * eps * sum |G_ij|. Rows that sum to zero
up to the rounding of their entries stay below 2 (random shapes, up to a thousand tasks)."""

GRAMIAN_ROUNDING = 64.0
"""c for a float32 or float64 Gramian that was computed elsewhere, whose entries carry the rounding
errors of a sum over P products; those of `torch.mm` reach 20 at P = 100,000."""

BLOCK = 1024
"""Rows of the Gramian that are formed at once, so that memory stays linear in T."""


def rounding(dtype: torch.dtype) -> float:
    """c * eps for rows of a dtype: float32's eps for half precision, too.

    Products are summed in float64, so that entries in half precision are as exact as any others.
    """
    return ROUNDING * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def vanish(s: Tensor, magnitude: Tensor | float, threshold: float) -> Tensor:
    """Are the scores s ``(T,)`` zero up to rounding, sum |s| <= threshold * magnitude? A scalar bool.

    Args:
        s: s_i = <v_i, sum_j v_j>.
        magnitude: a scalar, sum |<v_i, v_j>|, or (sum ||v_i||)^2, which is never less.
        threshold: c * eps.
    """
    return s.abs().sum() <= threshold * magnitude


def shares(s: Tensor, magnitude: Tensor | float, threshold: float) -> Tensor:
    """w_i = s_i / sum |s|, ``(T,)``; 1/T for one task, or where all s `vanish` (its arguments)."""
    if len(s) == 1:
        return torch.ones_like(s)
    return torch.where(vanish(s, magnitude, threshold), 1 / len(s), s / s.abs().sum())


def agreement_weights(gradients: Gradients, *, normalize: bool = False) -> Tensor:
    """Weights of T tasks by how far each gradient agrees with all of them (paper, equation 6).

        w_i = s_i / sum_k |s_k|,  s_i = sum_j <g_i, g_j>

    so sum |w_i| = 1, and a task that opposes the mean gets a negative weight. The weights are
    invariant to a common scale of the gradients and depend on their Gramian alone.

    Args:
        gradients: a ``(T, P)`` tensor, or a sequence of T per-task gradients, each a tensor, a
            sequence or a dict of tensors (None stands for zeros), such as `torch.autograd.grad`
            returns.
        normalize: scale each g_i to unit length first (ours, rule ``agreement-cosine``): the
            paper's s_i grows with the task's own length.

    Returns:
        ``(T,)`` weights, the gradients' dtype and device. One task, or all s_k zero up to rounding
        (sum |s| <= 4 * eps * sum |G_ij|, with float32's eps for half precision, too): uniform, 1/T.

    Raises:
        InputError: a gradient is not finite (the message names the task), or their structures
            differ.

    >>> agreement_weights(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
    tensor([ 0.2500,  0.5000, -0.2500])
    """
    vectors = Vectors.of(as_rows(gradients), unit=normalize)
    length, s = vectors.scores()
    check_finite(length, "gradient")
    threshold = rounding(vectors.rows.dtype)
    # sum |G_ij| is at most (sum ||g_i||)^2: only where the sums are that small is it worth its cost.
    magnitude = length.sum() ** 2
    if len(s) > 1 and bool(vanish(s, magnitude, threshold)):
        magnitude = _magnitude(vectors)
    return shares(s, magnitude, threshold).to(vectors.rows.dtype)


def _magnitude(vectors: Vectors) -> Tensor:
    """sum_ij |<v_i, v_j>|, from blocks of the Gramian."""
    factor = vectors.factor
    total = torch.zeros_like(factor[0])
    for start in range(0, len(factor), BLOCK):
        block = slice(start, start + BLOCK)
        products = factor.new_zeros(len(factor[block]), len(factor))
        for part in vectors.slices():
            products.addmm_(part[block], part.T)
        total += factor[block] @ products.abs() @ factor
    return total


def sharded_agreement(
    gradients: ShardedGradients, vectors: Vectors, slot: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weights of `agreement_weights` within each of K groups of tasks, over several processes.

    sum |G_ij| is not at hand, and its bound (sum ||g_i||)^2 decides what counts as zero up to
    rounding: sum |s| <= 4 * eps * (sum ||g_i||)^2, eps as there.

    Args:
        gradients: the tasks.
        vectors: those of this process's tasks that must agree, of one scale on all processes or
            each of unit length.
        slot: ``(T,)`` int64, the group of each task, 0 to K - 1, none of them empty; None is one
            group of all.

    Returns:
        The weights ``(T,)``, and the groups' sums ``(K, P)`` of ``vectors``; float64.

    Raises:
        InputError: a vector is not finite; the message, the same on all processes, names the task.
    """
    slot = torch.zeros_like(gradients.group) if slot is None else slot
    own, members = gradients.own, torch.nn.functional.one_hot(slot).T.double()
    total = gradients.processes.total(vectors.combined(members[:, own]))
    length, s = vectors.scores(total)
    s = s.gather(1, slot[own].unsqueeze(1)).squeeze(1)
    length, s = gradients.assembled(torch.stack([length, s], 1)).T
    check_finite(length, "gradient")
    threshold = rounding(vectors.rows.dtype)
    weights = torch.empty_like(s)
    for group in members > 0:
        weights[group] = shares(s[group], length[group].sum() ** 2, threshold)
    return weights, total


def agreement_weights_from_gramian(gramian: Tensor, *, normalize: bool = False) -> Tensor:
    """The weights of `agreement_weights` from the ``(T, T)`` Gramian G_ij = <g_i, g_j> alone.

    Args:
        gramian: that of some vectors: finite, symmetric, |G_ij| <= sqrt(G_ii G_jj), up to rounding
            (sqrt(eps) of its largest entry, float32's eps for float64, too); in the dtype in which
            it was computed, since the dtype tells how large its rounding errors may be.
        normalize: as in `agreement_weights`: G_ij / sqrt(G_ii G_jj) first.

    Returns:
        ``(T,)`` weights of the Gramian's dtype and device. One task, or all s_k zero up to rounding
        (sum |s| <= c * eps * sum |G_ij|, c = 64, or 4 below float32): uniform, 1/T.

    Raises:
        InputError: not a square tensor, not finite, or not the Gramian of any vectors; the message
            names the task, or the two.

    >>> agreement_weights_from_gramian(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
    tensor([0.3750, 0.6250])
    """
    check_gramian(gramian)
    gramian = gramian.detach()
    eps = torch.finfo(gramian.dtype).eps
    top = gramian.abs().max().to(wide_type(gramian))
    products = gramian.to(wide_type(gramian)) / torch.where(top > 0, top, 1.0)
    _check_possible(products, math.sqrt(max(eps, torch.finfo(torch.float32).eps)))
    if normalize:
        length = products.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(length > 0, 1 / length, 0.0)
        products = inverse.unsqueeze(1) * products * inverse
    threshold = eps * (GRAMIAN_ROUNDING if eps < 1e-5 else ROUNDING)
    return shares(products.sum(1), products.abs().sum(), threshold).to(gramian.dtype)


def _check_possible(products: Tensor, tolerance: float) -> None:
    """Are these ``(T, T)`` numbers, of which the largest is 1, inner products of some vectors?"""
    square = products.diagonal().clamp(min=0)
    bound = (square.unsqueeze(1) * square).sqrt()
    for wrong, law in (
        (products.diagonal().diag() < -tolerance, "a squared length is not negative"),
        ((products - products.T).abs() > tolerance, "G_ij = G_ji"),
        (products.abs() > bound + tolerance, "|G_ij| <= sqrt(G_ii G_jj)"),
    ):
        if bool(wrong.any()):
            i, j = wrong.nonzero()[0].tolist()
            raise InputError(
                f"gramian: G[{i}, {j}] cannot be the inner product of the gradients of tasks {i} "
                f"and {j} ({law}); pass G = g @ g.T of gradients g (T, P)"
            )


class GradientAgreement(nn.Module):
    """The rule of `agreement_weights` over all tasks of a meta-batch, whatever their objective.

    Args:
        signal: which vectors must agree: ``"meta_gradient"``, the rows that are combined
            (default), or ``"update"``, the inner-loop updates theta - theta_i, the paper's choice.
        normalize: see `agreement_weights`.

    Stateless. Returns `Weights` whose raw and effective weights are the same ``(T,)`` tensor.
    """

    def __init__(
        self,
        signal: Literal["meta_gradient", "update"] = "meta_gradient",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if signal not in ("meta_gradient", "update"):
            raise InputError(
                f"GradientAgreement: signal must be 'meta_gradient' or 'update', got '{signal}'"
            )
        self.signal, self.normalize = signal, normalize

    def forward(self, gradients: TaskGradients) -> Weights:
        """The weights of one meta-batch.

        Raises:
            InputError: a row or an update is not finite; the message names the task.
        """
        if self.signal == "update":
            check_finite(largest_entries(gradients.rows), "gradient")
        vectors = gradients.rows if self.signal == "meta_gradient" else gradients.updates
        weights = agreement_weights(vectors, normalize=self.normalize).to(gradients.rows)
        return Weights(raw=weights, effective=weights)

    def over_processes(self, gradients: ShardedGradients) -> tuple[Weights, Tensor]:
        """As in `gametalearn.weighting.sharded`; zero up to rounding is as in `sharded_agreement`."""
        rows = gradients.rows if self.signal == "meta_gradient" else gradients.updates
        largest = gradients.processes.largest
        vectors = Vectors.of(rows, unit=self.normalize, largest=largest)
        weights, _ = sharded_agreement(gradients, vectors)
        return Weights(raw=weights, effective=weights), gradients.combined(weights)


def require_updates(name: str, rule: object, steps: int) -> None:
    """Raise an `InputError` if a rule compares inner updates, and the learner takes no ``steps``."""
    if isinstance(rule, GradientAgreement) and rule.signal == "update" and steps == 0:
        raise InputError(
            f"rule '{name}' compares inner updates, and with 0 inner steps there are none; use agreement"
        )
