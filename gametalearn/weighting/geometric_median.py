"""The geometric median of the gradients (Weiszfeld 1937; Vardi & Zhang 2000, PNAS 97:1423)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gametalearn.gradients import TaskGradients
from gametalearn.weighting.vectors import gramian
from gametalearn.weighting.weights import Weights, check_gramian

__all__ = ["GeometricMedian", "geometric_median_weights"]

SMOOTHING = 1e-8
"""Distances below it, relative to the length of a central gradient and its distance to the others,
count as it: those of float64 products are not known any better."""

TOLERANCE = 1e-13
MOST_STEPS = 1000
"""Weiszfeld's iteration ends when no weight moves by more, nor the point by more of its distance to
the others, or after this many steps. Gradients that agree little take about 20; this many are taken
only if the median almost is one of them, and there the sum of distances hardly changes any more."""

ROUNDING = 64 * torch.finfo(torch.float64).eps
"""Squared distances below it, relative to the squared lengths, are zero."""

TIE = 1e-9
"""How far from exact Vardi & Zhang's condition may be, on a line for example, where both sides are
whole numbers."""


class GeometricMedian(nn.Module):
    """The point with the least sum of distances to all gradients, which outliers hardly move.

    sum_i e_i g_i = argmin_m sum_i ||m - g_i||

    It lies among the gradients, so that the weights are at least 0 and sum to 1, and until half of
    the tasks lie elsewhere, however far, it stays near the others. Used as Pillutla, Kakade &
    Harchaoui use it for the updates of clients ("Robust aggregation for federated learning", 2019,
    arXiv 1912.13445). Stateless; the weights are invariant to a common scale of the gradients, and
    depend on their Gramian alone. See `geometric_median_weights` for the edges.
    """

    def forward(self, gradients: TaskGradients) -> Weights:
        """Weights ``(T,)``.

        Raises:
            InputError: a row is not finite; the message names the task.
        """
        weights = geometric_median_weights(gramian(gradients.rows)).to(gradients.rows)
        return Weights(raw=weights, effective=weights)


def geometric_median_weights(gramian: Tensor) -> Tensor:
    """The weights w ``(T,)`` for which sum_i w_i g_i is the geometric median of the g_i.

    Where the median is none of the g_i it is a fixed point of Weiszfeld's iteration,

    w_i <- (1 / d_i) / sum_k (1 / d_k),  d_i = ||g_i - sum_j w_j g_j||,

    which starts with the median distance of g_i to all of them for d_i. It is g_k, by Vardi &
    Zhang's condition, where the sum of the unit vectors from g_k to those that differ from it is no
    longer than the number of those that equal it. On several such k, of equal gradients or an even
    number of them on a line, weights are equal: with T = 2, or all gradients alike, that is the mean.

    Args:
        gramian: ``(T, T)`` finite inner products G_ij = <g_i, g_j>.

    Returns:
        float64, on the CPU: each step of the iteration would hold up another device.

    Raises:
        InputError: not a square tensor, or not finite; the message names the task.
    """
    check_gramian(gramian)
    products = gramian.detach().double().cpu()
    square = products.diagonal()
    size = square.unsqueeze(1) + square
    apart = (size - 2 * products).clamp(min=0)  # squared distances
    distance = torch.where(apart > ROUNDING * size, apart, 0.0).fill_diagonal_(0.0).sqrt()
    typical = distance.median(1).values
    # The origin is moved to a gradient among most of the others, whose inner products thus are not
    # lost among those of a far longer one.
    centre = int(typical.argmin())
    around = products - products[centre].unsqueeze(1) - products[centre] + square[centre]
    anchors = _anchors(distance, around)
    if bool(anchors.any()):
        return anchors.double() / anchors.sum()
    reach = around.diagonal().clamp(min=0)
    least = SMOOTHING * (square[centre] + reach.median()).sqrt()
    span = (reach.sqrt() / reach.median().sqrt().clamp(min=least)).clamp(min=1)
    weights = 1 / typical.clamp(min=least)
    weights /= weights.sum()
    for _ in range(MOST_STEPS):
        mixed = around @ weights
        away = (reach - 2 * mixed + weights @ mixed).clamp(min=least**2).sqrt()
        inverse = away.min() / away
        before, weights = weights, inverse / inverse.sum()
        if float(((weights - before).abs() * span).max()) <= TOLERANCE:
            break
    return weights


def _anchors(distance: Tensor, around: Tensor) -> Tensor:
    """Which of the points at these distances ``(T, T)`` are their median, ``(T,)`` bool.

    If any is, it is one with the least sum of distances to the others.

    Args:
        distance: ``(T, T)``, 0 between points that are equal.
        around: ``(T, T)`` inner products of the points, from any origin.
    """
    total = distance.sum(1)
    inverse = torch.where(distance > 0, 1 / distance, 0.0)
    # ||sum_i (g_i - g_k) / d_ik||^2
    mixed, sums = inverse @ around, inverse.sum(1)
    pull = (mixed * inverse).sum(1) - 2 * sums * mixed.diagonal() + sums**2 * around.diagonal()
    alike = (distance == 0).sum(1)
    return (total <= total.min() * (1 + TIE)) & (pull <= alike**2 * (1 + TIE))
