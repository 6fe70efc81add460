"""Diagnostics of one meta-batch: how far its tasks agree, and what the weights make of them.

Pure functions of `TaskGradients` and `Weights`; nearly all is read off the ``(T, T)`` Gramian, at
the cost of one more of it (3 ms for 16 tasks of 112,005 parameters on one core).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.records import one_line
from gametalearn.weighting.vectors import gramian, update_length
from gametalearn.weighting.weights import Weights, check_finite

__all__ = [
    "Diagnostics",
    "ObjectiveDiagnostics",
    "cosine_matrix",
    "diagnose",
    "effective_tasks",
    "negative_share",
]


@dataclass(frozen=True)
class ObjectiveDiagnostics:
    """What `Diagnostics` says of the tasks of one objective, e_i being their effective weights.

    Attributes:
        tasks: how many there are.
        weight: sum of e_i.
        update_norm: ||sum_i e_i g_i||, the length of the objective's part of the update.
        effective_tasks: (sum |e_i|)^2 / sum e_i^2, between 1 and ``tasks``.
        negative_share: the share of tasks with e_i < 0.
        mean_cosine: mean cosine between two different tasks of the objective; None for one task.
        update_cosine: cosine between the objective's mean gradient and the whole update: negative
            where the update works against the objective.
    """

    tasks: int
    weight: float
    update_norm: float
    effective_tasks: float
    negative_share: float
    mean_cosine: float | None
    update_cosine: float


@dataclass(frozen=True)
class Diagnostics:
    """One meta-batch, T tasks with gradients g_i and effective weights e_i.

    Attributes:
        cosine: ``(T, T)`` float64 on the CPU, cosines between the g_i; those with a zero gradient
            are 0.
        norms: ``(T,)`` float64 on the CPU, the lengths ||g_i||.
        mean_cosine: mean cosine between two different tasks; None for one task.
        update_norm: ||sum_i e_i g_i||, the length of the update before the meta-optimizer.
        mean_norm: ||sum_i g_i / T||, that of the uniform update.
        update_cosine: cosine between the two: how far the weights turned the update.
        effective_tasks: (sum |e_i|)^2 / sum e_i^2, between 1 (a single task counts) and T (all
            count alike); 0 where all weights vanish.
        negative_share: the share of tasks with e_i < 0.
        objectives: the same by objective, under its group identity, in ascending order.
        objective_cosine: ``(K, K)`` cosines between the objectives' mean gradients, in that order.
    """

    cosine: Tensor
    norms: Tensor
    mean_cosine: float | None
    update_norm: float
    mean_norm: float
    update_cosine: float
    effective_tasks: float
    negative_share: float
    objectives: dict[int, ObjectiveDiagnostics]
    objective_cosine: Tensor

    __repr__ = one_line

    def as_record(self, *, matrices: bool = True, digits: int = 4) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries for a line of JSON, without NaN.

        Args:
            matrices: with the two cosine matrices, as lists of rows.
            digits: decimals of cosines, significant digits of all else.
        """

        def plain(value: float | None) -> float | None:
            return float(f"{value:.{digits}g}") if isinstance(value, float) else value

        record: dict[str, Any] = {
            name: plain(getattr(self, name))
            for name in (
                "mean_cosine",
                "update_norm",
                "mean_norm",
                "update_cosine",
                "effective_tasks",
                "negative_share",
            )
        }
        record["objectives"] = {
            str(group): {name: plain(value) for name, value in vars(objective).items()}
            for group, objective in self.objectives.items()
        }
        record["norms"] = [plain(value) for value in self.norms.tolist()]
        if matrices:
            for name in ("cosine", "objective_cosine"):
                rows = getattr(self, name).tolist()
                record[name] = [[round(value, digits) for value in row] for row in rows]
        return record


def diagnose(gradients: TaskGradients, weights: Weights) -> Diagnostics:
    """The diagnostics of one meta-batch.

    Args:
        gradients: T tasks.
        weights: what a rule made of them; only ``effective`` is used.

    Raises:
        InputError: a row is not finite (the message names the task), or the weights are not T.
    """
    if weights.effective.shape != (len(gradients),):
        raise InputError(
            f"diagnose: expected {len(gradients)} effective weights, one for each task; "
            f"got {tuple(weights.effective.shape)}"
        )
    check_finite(weights.effective, "effective weight")
    # Products relative to the longest gradient, on the CPU: what follows is small.
    products = gramian(gradients.rows).cpu().double()
    effective = weights.effective.detach().cpu().double()
    group = gradients.group.cpu()
    groups = sorted(set(group.tolist()))
    members = torch.stack([group == g for g in groups]).double()
    # Combinations of gradients: the update, the mean, then each objective's part and mean.
    uniform = torch.full_like(effective, 1 / len(effective))
    means = members / members.sum(1, keepdim=True)
    combinations = torch.cat([torch.stack([effective, uniform]), members * effective, means])
    each = torch.eye(len(effective), dtype=torch.float64)
    wanted = torch.cat([combinations, each]).to(gradients.rows.device)
    found = update_length(gradients.rows, wanted).cpu()
    lengths, norms = found[: len(combinations)].tolist(), found[len(combinations) :]
    size = combinations.abs()
    between = _cosines(
        combinations @ products @ combinations.T, ((size @ products.abs()) * size).sum(1)
    )
    cosine = _cosines(products)
    objectives = {}
    for k, g in enumerate(groups):
        tasks = (group == g).nonzero().flatten()
        objectives[g] = ObjectiveDiagnostics(
            tasks=len(tasks),
            weight=float(effective[tasks].sum()),
            update_norm=lengths[2 + k],
            effective_tasks=effective_tasks(effective[tasks]),
            negative_share=negative_share(effective[tasks]),
            mean_cosine=_mean_off_diagonal(cosine[tasks][:, tasks]),
            update_cosine=float(between[2 + len(groups) + k, 0]),
        )
    return Diagnostics(
        cosine=cosine,
        norms=norms.double(),
        mean_cosine=_mean_off_diagonal(cosine),
        update_norm=lengths[0],
        mean_norm=lengths[1],
        update_cosine=float(between[0, 1]),
        effective_tasks=effective_tasks(effective),
        negative_share=negative_share(effective),
        objectives=objectives,
        objective_cosine=between[2 + len(groups) :, 2 + len(groups) :],
    )


def cosine_matrix(gradients: Tensor) -> Tensor:
    """Cosines ``(T, T)`` between rows ``(T, P)``, float64; those with a zero row are 0."""
    return _cosines(gramian(gradients))


def effective_tasks(weights: Tensor) -> float:
    """(sum |w|)^2 / sum w^2 of ``(T,)`` weights: how many tasks count; 0 where all vanish.

    >>> effective_tasks(torch.tensor([0.5, -0.5, 0.0]))
    2.0
    """
    largest = weights.abs().max()
    if not largest > 0:
        return 0.0
    scaled = weights.double().abs() / largest
    return float(scaled.sum() ** 2 / scaled.square().sum())


def negative_share(weights: Tensor) -> float:
    """The share of ``(T,)`` weights below zero."""
    return float((weights < 0).double().mean())


def _cosines(products: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """Cosines from inner products; 0 for vectors that are zero, or are up to the rounding of sums
    of ``magnitude``."""
    square = products.diagonal().clamp(min=0)
    zero = 0.0 if magnitude is None else 64 * torch.finfo(products.dtype).eps * magnitude
    inverse = torch.where(square > zero, square.rsqrt(), 0.0)
    return (inverse.unsqueeze(1) * products * inverse).clamp(-1, 1)


def _mean_off_diagonal(cosine: Tensor) -> float | None:
    count = len(cosine)
    if count < 2:
        return None
    return float(cosine.sum() - cosine.trace()) / (count * (count - 1))
