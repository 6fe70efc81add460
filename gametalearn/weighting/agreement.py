"""Gradient agreement (Eshratifar, Eigen, Pedram 2018, arXiv 1810.08178)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.weights import (
    Gradients,
    Weights,
    as_rows,
    check_finite,
    check_tensor,
    largest_entries,
)

__all__ = [
    "GradientAgreement",
    "agreement_weights",
    "agreement_weights_from_gramian",
    "gramian",
    "update_length",
]

TOLERANCE = 4.0
"""c in: all s_k are zero up to rounding when sum |s| <= c * eps * sum |G_ij|. Rows that sum to zero
up to the rounding of their entries stay below 2 (random shapes, up to a thousand tasks)."""

GRAMIAN_TOLERANCE = 64.0
"""c for a float32 or float64 Gramian that was computed elsewhere, whose entries carry the rounding
errors of a sum over P products; those of `torch.mm` reach 20 at P = 100,000."""

BLOCK = 1024
"""Rows of the Gramian that are formed at once, so that memory stays linear in T."""

SLICE = 2**18
"""Entries of a slice of columns in float64: 2 MB, which stay in the cache."""


def gramian(gradients: Gradients) -> Tensor:
    """Inner products ``(T, T)`` of per-task gradients, in float64, relative to the longest one.

    G_ij = <g_i, g_j> / max_k ||g_k||^2

    so the largest entry is 1 (or all are 0) and nothing overflows or underflows; every rule here is
    invariant to the common factor. Accumulated in float64 (in float32 on devices that lack it) from
    slices of columns, so the copy is small.

    Raises:
        InputError: a row is not finite; the message names the task.
    """
    rows = as_rows(gradients).detach()
    products = torch.zeros(len(rows), len(rows), dtype=_wide(rows), device=rows.device)
    for part in _slices(rows, _scale(rows)):
        products.addmm_(part, part.T)
    # In the wide type a finite row has a finite square.
    check_finite(products.diagonal(), "gradient")
    longest = products.diagonal().max()
    return products / longest if longest > 0 else products


def update_length(gradients: Gradients, weights: Tensor) -> Tensor:
    """||sum_i w_i g_i||, accumulated in float64 (in float32 on devices that lack it).

    Args:
        gradients: as in `agreement_weights`.
        weights: ``(T,)``, or ``(K, T)`` for K such combinations.

    Returns:
        A scalar, or ``(K,)``.
    """
    rows = as_rows(gradients).detach()
    scale = _scale(rows)
    w = weights.detach().to(scale)
    square = w.new_zeros(w.shape[:-1])
    for part in _slices(rows, scale):
        square += (w @ part).square().sum(-1)
    return scale.max() * square.sqrt()


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float32 if rows.device.type == "mps" else torch.float64


def _is_narrow(rows: Tensor) -> bool:
    """Whether products of entries can neither overflow nor underflow in the wide type."""
    return torch.finfo(rows.dtype).max < math.sqrt(torch.finfo(_wide(rows)).max) / 2**32


def _scale(rows: Tensor, each: bool = False) -> Tensor:
    """What rows are divided by before squaring: ``(1, 1)``, or ``(T, 1)`` with ``each``."""
    if _is_narrow(rows):
        return torch.ones(1, 1, dtype=_wide(rows), device=rows.device)
    largest = largest_entries(rows)
    check_finite(largest, "gradient")
    largest = (largest if each else largest.amax(0, keepdim=True)).unsqueeze(1).to(_wide(rows))
    return torch.where(largest > 0, largest, 1.0)


def _slices(rows: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """``rows / scale`` in the wide type, a slice of columns at a time."""
    for part in torch.split(rows, max(1, SLICE // len(rows)), dim=1):
        yield part.to(_wide(rows)) if _is_narrow(rows) else part.to(_wide(rows)) / scale


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
        (sum |s| <= 4 * eps * sum |G_ij|): uniform, 1/T.

    Raises:
        InputError: a gradient is not finite (the message names the task), or their structures
            differ.

    >>> agreement_weights(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
    tensor([ 0.2500,  0.5000, -0.2500])
    """
    rows = as_rows(gradients).detach()
    scale = _scale(rows, each=normalize)
    inverse = torch.ones(len(rows), dtype=_wide(rows), device=rows.device)
    length, s = _lengths_and_sums(rows, scale, inverse)
    check_finite(length, "gradient")
    if normalize:
        inverse = _inverse(length)
        length, s = _lengths_and_sums(rows, scale, inverse)
    threshold = TOLERANCE * torch.finfo(rows.dtype).eps
    # sum |G_ij| is at most (sum ||g_i||)^2: only where the sums are that small is it worth its cost.
    magnitude = length.sum() ** 2
    if s.abs().sum() <= threshold * magnitude:
        magnitude = _magnitude(rows, scale, inverse)
    return _normalized(s, magnitude, threshold).to(rows.dtype)


def _inverse(length: Tensor) -> Tensor:
    """What scales each gradient to unit length; a zero one stays zero."""
    return torch.where(length > 0, 1 / length, 0.0)


def _lengths_and_sums(rows: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """||v_i|| and s_i = <v_i, sum_j v_j>, ``(T,)``, of v_i = ``inverse[i] * rows[i] / scale``.

    One pass over the rows, without T^2 numbers; where gradients cancel, s is far more precise than
    a sum over j of G_ij.
    """
    square, s = torch.zeros_like(inverse), torch.zeros_like(inverse)
    for part in _slices(rows, scale):
        square += torch.linalg.vector_norm(part, dim=1).square()
        s += part @ (inverse @ part)
    return square.sqrt() * inverse, s * inverse


def _magnitude(rows: Tensor, scale: Tensor, inverse: Tensor) -> Tensor:
    """sum_ij |<v_i, v_j>| of the same v, from blocks of the Gramian."""
    total = torch.zeros_like(inverse[0])
    for start in range(0, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        products = total.new_zeros(len(rows[block]), len(rows))
        for part in _slices(rows, scale):
            products.addmm_(part[block], part.T)
        total += inverse[block] @ products.abs() @ inverse
    return total


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
    check_tensor(gramian, "gramian")
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        raise InputError(f"gramian: expected a (T, T) tensor, got {tuple(gramian.shape)}")
    gramian = gramian.detach()
    # A gradient that is not finite makes a whole row and column so; its own place is the diagonal.
    check_finite(gramian.diagonal(), "Gramian row")
    check_finite(gramian.abs().amax(1), "Gramian row")
    eps = torch.finfo(gramian.dtype).eps
    top = gramian.abs().max().to(_wide(gramian))
    products = gramian.to(_wide(gramian)) / torch.where(top > 0, top, 1.0)
    _check_possible(products, math.sqrt(max(eps, torch.finfo(torch.float32).eps)))
    if normalize:
        inverse = _inverse(products.diagonal().clamp(min=0).sqrt())
        products = inverse.unsqueeze(1) * products * inverse
    threshold = eps * (GRAMIAN_TOLERANCE if eps < 1e-5 else TOLERANCE)
    return _normalized(products.sum(1), products.abs().sum(), threshold).to(gramian.dtype)


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


def _normalized(s: Tensor, magnitude: Tensor, threshold: float) -> Tensor:
    total = s.abs().sum()
    if len(s) == 1 or bool(total <= threshold * magnitude):
        return torch.full_like(s, 1 / len(s))
    return s / total


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
