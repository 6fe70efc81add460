"""GradNorm (Chen, Badrinarayanan, Lee, Rabinovich 2018, arXiv 1711.02257)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gametalearn.adaptation import RATE
from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.descent import Descent
from gametalearn.weighting.objectives import ObjectiveBatch, Objectives, loss_ratio, over_objectives
from gametalearn.weighting.vectors import update_length
from gametalearn.weighting.weights import Weights

__all__ = ["GradNorm", "shared_columns"]


class GradNorm(nn.Module):
    """Weights of objectives whose gradients on the shared weights W train at similar rates.

    The weights minimise, by one step per iteration (equation 2),

        sum_i |G_i - Gbar * r_i^alpha|

    over w, with G_i = ||w_i grad_W L_i||, Gbar their mean, r_i = Ltilde_i / mean(Ltilde) with
    Ltilde_i = L_i(t) / L_i(0) the relative inverse training rate; the target Gbar * r_i^alpha is
    held constant. After the step, w is renormalised to sum to K (algorithm 1). The weights of an
    iteration are those before its step, as are the norms. The gradient on W is read off the rows
    that the meta-update needs anyway, so there is no extra backward pass.

    Where this differs from the paper: its additive step can make a weight negative; ours is clamped
    to ``floor`` before it is renormalised. Norms are measured in units of their mean at the first
    iteration, which Adam does not notice and which makes the weights independent of a common scale
    of the losses. An objective that is absent from a meta-batch keeps its weight, its moments and
    its L_i(0), which is the loss where it was first seen; means then are over those present, whose
    weights keep their sum. In ``eval()`` nothing moves.

    Args:
        objectives: K, for groups 0 to K - 1, or the groups' identities.
        alpha: strength of the pull towards equal training rates; 0 asks for equal gradient norms.
        lr: rate of the weights' own optimiser.
        floor: smallest weight before renormalisation.
        optimizer: ``"adam"`` or ``"sgd"``, for the weights.
        columns: the columns of the rows that belong to W, a slice or a tensor of indices (see
            `shared_columns`); None takes all.
        within: how the tasks of one objective are combined, ``"uniform"`` or ``"agreement"``; G_i is
            the length of that combination.
        balance: K shares of the objectives at equal weights; None: equal ones (see `Objectives`).

    The weights are the parameter ``weights`` ``(K,)``, which needs no other optimiser. ``facts`` has the
    ``r`` ``(K,)`` of the last meta-batch, NaN for an objective that is absent.
    """

    initial_loss: Tensor
    seen: Tensor
    unit: Tensor
    columns: Tensor | None

    def __init__(
        self,
        objectives: int | Sequence[int],
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        floor: float = 1e-3,
        optimizer: Literal["adam", "sgd"] = "adam",
        columns: slice | Tensor | None = None,
        within: Literal["uniform", "agreement"] = "uniform",
        balance: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < floor < 1:
            raise InputError(f"GradNorm: floor must be between 0 and 1, got {floor}")
        if not alpha >= 0:
            raise InputError(f"GradNorm: alpha must not be negative, got {alpha}")
        self.alpha, self.floor = alpha, floor
        self.objectives = Objectives(objectives, within, balance)
        size = len(self.objectives)
        self.descent = Descent(size, lr, optimizer)
        self.weights = nn.Parameter(torch.ones(size, dtype=torch.float64), requires_grad=False)
        self.register_buffer("initial_loss", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("unit", torch.zeros((), dtype=torch.float64))
        self.span = columns if isinstance(columns, slice) else None
        index = columns if isinstance(columns, Tensor) else None
        self.register_buffer("columns", index, persistent=False)
        self.facts: dict[str, Tensor] = {}

    over_processes = over_objectives

    def forward(self, gradients: TaskGradients) -> Weights:
        """The weights of one meta-batch; raw ones ``(K,)`` sum to K.

        Raises:
            InputError: a loss is negative or not finite, a row is not finite, or a task's group is
                unknown.
        """
        batch = self.objectives.read(gradients, nonnegative_loss=True)
        weights = batch.weights(self.weights.clone())
        if self.training:
            self._step(batch)
        return weights

    def _shared(self, rows: Tensor) -> Tensor:
        if self.span is not None:
            return rows[:, self.span]
        return rows if self.columns is None else rows[:, self.columns.to(rows.device)]

    @torch.no_grad()
    def _step(self, batch: ObjectiveBatch) -> None:
        present, loss = batch.present, batch.loss
        first = present & ~self.seen
        self.initial_loss[first] = loss[first]
        self.seen |= present
        progress = loss_ratio(loss, self.initial_loss)
        rate = progress / progress[present].mean()
        self.facts = {"r": torch.where(present & torch.isfinite(rate), rate, torch.nan)}
        norms = update_length(self._shared(batch.gradients.rows), batch.mixture()).to(loss)
        if self.unit == 0:
            self.unit.copy_(norms[present].mean())
        gradient = torch.zeros_like(loss)
        gradient[present] = weight_gradient(
            self.weights[present],
            norms[present] / self.unit if self.unit > 0 else norms[present],
            progress[present],
            self.alpha,
        )
        total = self.weights[present].sum()
        self.descent.step(self.weights, gradient, present)
        clamped = self.weights[present].clamp(min=self.floor)
        self.weights[present] = clamped * total / clamped.sum()


def weight_gradient(weights: Tensor, norms: Tensor, progress: Tensor, alpha: float) -> Tensor:
    """d/dw_i of sum_i |w_i n_i - target_i|, target_i = mean(w n) * (Ltilde_i / mean(Ltilde))^alpha.

    Args:
        weights, norms, progress: ``(K,)``, w, n = ||grad_W L|| and Ltilde.
        alpha: the exponent.
    """
    lengths = weights * norms
    mean = progress.mean()
    rate = progress / mean if mean > 0 else torch.ones_like(progress)
    return torch.sign(lengths - lengths.mean() * rate**alpha) * norms


def shared_columns(
    named_shapes: Mapping[str, Sequence[int]], name: str | None = None
) -> slice | Tensor:
    """The columns of the rows that hold the shared weights W of GradNorm.

    Args:
        named_shapes: the shape of every meta-parameter by name, in the order of the rows, such as
            ``{n: p.shape for n, p in model.named_parameters() if p.requires_grad}``.
        name: the parameter, or the module whose parameters W is. By default the last shared layer:
            the last module with a matrix or a filter bank (so no normalisation) before the head,
            which is the module ``head`` or else the last such module. A model of a single layer
            is its own W. Learned inner rates are never taken by default.

    Returns:
        A slice where the columns are contiguous, else their indices, int64.

    Raises:
        InputError: no parameter has that name.

    >>> shared_columns({"conv.weight": (8, 3, 3, 3), "norm.bias": (8,), "head.weight": (5, 8)})
    slice(0, 216, None)
    """
    if not named_shapes:
        raise InputError("shared_columns: no parameters")
    if name is None:
        layers = [
            n.rpartition(".")[0]
            for n, shape in named_shapes.items()
            if len(shape) > 1 and not n.startswith(RATE)
        ] or [next(iter(named_shapes)).rpartition(".")[0]]
        body = [layer for layer in layers if layer.split(".")[0] != "head"]
        has_head = len(body) < len(layers)
        last = (body if has_head or len(body) == 1 else body[:-1]) or layers
        chosen = [n for n in named_shapes if n.rpartition(".")[0] == last[-1]]
    else:
        chosen = [n for n in named_shapes if n == name or n.startswith(name + ".")]
    if not chosen:
        names = list(named_shapes)
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.3) or names[:3]
        raise InputError(
            f"shared weights: no parameter or module '{name}'; there are {', '.join(near)}, ..."
        )
    pieces, start = [], 0
    for n, shape in named_shapes.items():
        size = int(torch.Size(shape).numel())
        if n in chosen:
            pieces.append(torch.arange(start, start + size))
        start += size
    columns = torch.cat(pieces)
    low, high = int(columns[0]), int(columns[-1]) + 1
    return slice(low, high) if high - low == len(columns) else columns
