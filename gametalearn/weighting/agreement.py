"""Gradient agreement (Eshratifar, Eigen, Pedram 2018, arXiv 1810.08178)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.weights import Gradients, Weights, as_rows, check_finite

__all__ = ["GradientAgreement", "agreement_weights", "agreement_weights_from_gramian", "gramian"]

TOLERANCE = 4.0
"""c in: all s_k are zero up to rounding when sum |s| <= c * eps * sum |G_ij|."""


GRAMIAN_TASKS = 1024
"""Up to this many tasks the Gramian is formed; beyond it, memory stays linear in T."""


def gramian(gradients: Gradients) -> Tensor:
    """Scaled inner products ``(T, T)`` of per-task gradients, in float64.

    G_ij = <g_i, g_j> / m^2 with m the largest absolute entry of all rows, so that nothing overflows
    or underflows; every rule here is invariant to the common factor. Accumulated in float64 (in
    float32 on devices that lack it), in slices of columns, so the copy is small.

    Raises:
        InputError: a row is not finite; the message names the task.
    """
    rows = as_rows(gradients).detach()
    result = torch.zeros(len(rows), len(rows), dtype=_wide(rows), device=rows.device)
    for part in _scaled_columns(rows):
        result.addmm_(part, part.T)
    return result


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _scaled_columns(rows: Tensor) -> Iterator[Tensor]:
    """Slices of ``rows / max |rows|`` by columns, in float64; none if all are zero."""
    scale = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    check_finite(scale, "gradient")
    largest = scale.max().to(_wide(rows))
    if largest > 0:
        for part in torch.split(rows, max(1, 2**22 // len(rows)), dim=1):
            yield part.to(_wide(rows)) / largest


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
    eps = torch.finfo(rows.dtype).eps
    if len(rows) <= GRAMIAN_TASKS:
        return _from_gramian(gramian(rows), eps, normalize).to(rows.dtype)
    # s_i = <g_i, sum_j g_j> needs no (T, T) matrix; sum |G_ij| is replaced by its upper bound
    # (sum ||g_i||)^2.
    length = rows.new_zeros(len(rows), dtype=_wide(rows))
    for part in _scaled_columns(rows):
        length += part.square().sum(1)
    length = length.sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0) if normalize else torch.ones_like(length)
    s = torch.zeros_like(length)
    for part in _scaled_columns(rows):
        unit = part * inverse.unsqueeze(1)
        s += unit @ unit.sum(0)
    return _normalized(s, (inverse * length).sum() ** 2, eps).to(rows.dtype)


def agreement_weights_from_gramian(gramian: Tensor, *, normalize: bool = False) -> Tensor:
    """The weights of `agreement_weights` from the ``(T, T)`` Gramian G_ij = <g_i, g_j> alone.

    Args:
        gramian: symmetric, finite; in the dtype in which it was computed, since the dtype tells
            how large its rounding errors may be.
        normalize: as in `agreement_weights`: G_ij / sqrt(G_ii G_jj) first.

    Returns:
        ``(T,)`` weights of the Gramian's dtype and device.

    Raises:
        InputError: not square, or not finite.
    """
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        raise InputError(f"gramian: expected a (T, T) tensor, got {tuple(gramian.shape)}")
    largest = gramian.detach().abs().amax(1)
    check_finite(largest, "Gramian row")
    wide = gramian.detach().to(torch.float32 if gramian.device.type == "mps" else torch.float64)
    top = largest.max().to(wide.dtype)
    scaled = wide / top if top > 0 else wide
    return _from_gramian(scaled, torch.finfo(gramian.dtype).eps, normalize).to(gramian.dtype)


def _from_gramian(gramian: Tensor, eps: float, normalize: bool) -> Tensor:
    if normalize:
        length = gramian.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(length > 0, 1 / length, 0.0)
        gramian = inverse.unsqueeze(1) * gramian * inverse
    return _normalized(gramian.sum(1), gramian.abs().sum(), eps)


def _normalized(s: Tensor, magnitude: Tensor, eps: float) -> Tensor:
    total = s.abs().sum()
    if len(s) == 1 or bool(total <= TOLERANCE * eps * magnitude):
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
        """The weights of one meta-batch."""
        vectors = gradients.rows if self.signal == "meta_gradient" else gradients.updates
        weights = agreement_weights(vectors, normalize=self.normalize).to(gradients.rows.dtype)
        return Weights(raw=weights, effective=weights)
