"""Gradients as vectors in range: their lengths, sums and inner products.

Rules square gradients, so these are divided by their largest entry first where squares could leave
the range of the wide type: float64, or float32 on devices that lack it. Everything is accumulated in
that type from slices of columns, so the rows are never copied in it as a whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gametalearn.weighting.weights import Gradients, as_rows, check_finite, largest_entries

__all__ = ["Vectors", "gramian", "update_length", "wide_type"]

SLICE = 2**18
"""Entries of a slice of columns in float64: 2 MB, which stay in the cache of a CPU."""
SLICE_CUDA = 2**24
"""The same on a GPU: 128 MB, so that a slice costs more than the launch of its kernels. By the kind of
device alone: processes that sum slices together cut them alike."""


def wide_type(tensor: Tensor) -> torch.dtype:
    """What sums over ``tensor`` are accumulated in: float64, or float32 on devices that lack it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def slice_width(device: str, tasks: int) -> int:
    """Columns of a slice of ``(tasks, P)``, on a kind of device.

    >>> slice_width("cpu", 16), slice_width("cuda", 16)
    (16384, 1048576)
    """
    return max(1, (SLICE_CUDA if device == "cuda" else SLICE) // max(1, tasks))


@dataclass(frozen=True)
class Vectors:
    """v_i = factor_i * rows_i / scale_i, t vectors of P entries; t may be 0.

    Attributes:
        rows: ``(t, P)``, of any floating dtype.
        scale: what rows are divided by before they are multiplied: a number, ``(1, 1)`` or
            ``(t, 1)``; None where products of entries stay in range anyway.
        factor: ``(t,)`` in the wide type.
    """

    rows: Tensor
    scale: Tensor | float | None
    factor: Tensor

    @classmethod
    def of(
        cls,
        rows: Tensor,
        *,
        unit: bool = False,
        largest: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> Vectors:
        """Rows ``(t, P)`` by one common scale, or each scaled to unit length (a zero one stays so).

        Args:
            rows: the gradients.
            unit: scale each to unit length.
            largest: from the largest entry of these rows ``(1,)`` to that of all rows, where others
                are elsewhere. Not asked where entries need no scale or each row has its own.

        Raises:
            InputError: a row is not finite; the message names the task. (Without ``unit``, only
                where a scale is needed: a length that is not finite tells otherwise.)
        """
        rows = rows.detach()
        ones = torch.ones(len(rows), dtype=wide_type(rows), device=rows.device)
        vectors = cls(rows, None, ones)
        if torch.finfo(rows.dtype).max >= math.sqrt(torch.finfo(ones.dtype).max) / 2**32:
            top = largest_entries(rows)
            check_finite(top, "gradient")
            if not unit:
                top = largest(torch.cat([top, top.new_zeros(1)]).amax(0, keepdim=True))
            top = top.unsqueeze(1).to(ones)
            vectors = cls(rows, torch.where(top > 0, top, 1.0), ones)
        if not unit:
            return vectors
        length = vectors.lengths()
        check_finite(length, "gradient")
        return dataclasses.replace(vectors, factor=torch.where(length > 0, 1 / length, 0.0))

    @property
    def width(self) -> int:
        """Columns of a slice."""
        return slice_width(self.rows.device.type, len(self.rows))

    def slices(self) -> Iterator[Tensor]:
        """``rows / scale`` in the wide type, a slice of columns at a time."""
        for part in torch.split(self.rows, self.width, dim=1):
            wide = part.to(self.factor.dtype)
            yield wide if self.scale is None else wide / self.scale

    def lengths(self) -> Tensor:
        """||v_i||, ``(t,)``."""
        square = torch.zeros_like(self.factor)
        for part in self.slices():
            square += torch.linalg.vector_norm(part, dim=1).square()
        return square.sqrt() * self.factor

    def combined(self, weights: Tensor) -> Tensor:
        """sum_i weights_i v_i: ``(P,)`` for weights ``(t,)``, ``(K, P)`` for ``(K, t)``."""
        weights = weights * self.factor
        sums = weights.new_empty(*weights.shape[:-1], self.rows.shape[1])
        for target, part in zip(sums.split(self.width, -1), self.slices(), strict=True):  # type: ignore[no-untyped-call]
            target.copy_(weights @ part)
        return sums

    def scores(self, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """||v_i|| ``(t,)`` and s_i = <v_i, total>, in one pass over the rows.

        Args:
            total: ``(P,)``, or ``(K, P)`` for K of them; None stands for sum_j v_j of these very
                vectors. (Where they cancel, that is far more precise than a sum of t products.)

        Returns:
            The lengths, and s ``(t,)``, or ``(t, K)``; in the wide type.
        """
        square = torch.zeros_like(self.factor)
        s = square.new_zeros(len(self.rows), *(() if total is None else total.shape[:-1]))
        totals = itertools.repeat(None) if total is None else total.split(self.width, -1)  # type: ignore[no-untyped-call]
        for part, given in zip(self.slices(), totals, strict=False):
            square += torch.linalg.vector_norm(part, dim=1).square()
            s += part @ (self.factor @ part if given is None else given.t())
        return square.sqrt() * self.factor, (s.t() * self.factor).t()

    def restored(self, values: Tensor) -> Tensor:
        """``values`` of vectors of one common scale, in the scale of the rows."""
        return values if self.scale is None else values * torch.as_tensor(self.scale).max()


def gramian(gradients: Gradients) -> Tensor:
    """Inner products ``(T, T)`` of per-task gradients, in float64, relative to the longest one.

        G_ij = <g_i, g_j> / max_k ||g_k||^2

    so the largest entry is 1 (or all are 0) and nothing overflows or underflows; every rule here is
    invariant to the common factor. In float32 on devices that lack float64.

    Raises:
        InputError: a row is not finite; the message names the task.
    """
    vectors = Vectors.of(as_rows(gradients))
    products = vectors.factor.new_zeros(len(vectors.rows), len(vectors.rows))
    for part in vectors.slices():
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
    vectors = Vectors.of(as_rows(gradients))
    weights = weights.detach().to(vectors.factor)
    square = weights.new_zeros(weights.shape[:-1])
    for part in vectors.slices():
        square += (weights @ part).square().sum(-1)
    return vectors.restored(square.sqrt())
