"""Evaluation: adapt to unseen episodes, one accuracy each, with a confidence interval.

A trained run or any pretrained module is tested and adapted in three lines, and what comes of it is
an ordinary module, whose ``state_dict`` loads where gametalearn is not installed::

    run = load_run("runs/a")
    print(evaluate(run.model, source, run.test_learner, meta=run.meta))
    torch.save(adapt(run.model, x, y, run.test_learner, meta=run.meta).state_dict(), "w.pt")
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gametalearn.adaptation import Learner, Params, default_loss, model_parameters
from gametalearn.distributed import ALONE, Team
from gametalearn.engine.loop import first_order
from gametalearn.engine.task import Loss, fixed_tensors, support_loss
from gametalearn.episodes import Source
from gametalearn.errors import InputError
from gametalearn.gradients import adapt_and_score

__all__ = ["Evaluation", "Protocol", "adapt", "ci95", "evaluate", "protocol_of"]

Protocol = Literal["transductive", "inductive", "query-at-a-time"]
"""How a query is predicted:

- ``"transductive"``: in one batch with the episode's other queries, by whose statistics it is
  normalised too: MAML's published numbers.
- ``"inductive"``: normalised by the support set's statistics alone; other queries have no part.
- ``"query-at-a-time"``: in a batch of the support set and this one query, so that it cannot depend
  on the others whatever the module does: Reptile's published non-transductive numbers.
"""


def ci95(values: np.ndarray[Any, Any]) -> float:
    """Half width of the 95% interval of a mean: 1.96 standard errors; 0 for fewer than 2 values."""
    return 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Evaluation:
    """Results on E episodes.

    Attributes:
        values: ``(E,)`` float64, accuracy in [0, 1] or mean squared error, an episode each.
        group: ``(E,)`` int64, the episodes' objectives.
        metric: ``accuracy`` or ``mse``.
        protocol: how queries were normalised; see `gametalearn.models`.
        seed: of the episodes.
    """

    values: np.ndarray[Any, np.dtype[np.float64]]
    group: np.ndarray[Any, np.dtype[np.int64]]
    metric: str
    protocol: Protocol
    seed: int

    @property
    def mean(self) -> float:
        """The mean over episodes; with several objectives, the mean over them."""
        return float(np.mean([v.mean() for v in self.by_group().values()]))

    @property
    def ci95(self) -> float:
        """Half width of the 95% confidence interval over episodes."""
        return ci95(self.values)

    def by_group(self) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]]:
        """The values of each objective."""
        return {int(g): self.values[self.group == g] for g in np.unique(self.group)}

    def of_group(self, group: int) -> Evaluation:
        """The episodes of one objective."""
        own = self.group == group
        return replace(self, values=self.values[own], group=self.group[own])

    def __str__(self) -> str:
        scale, unit = (100, "%") if self.metric == "accuracy" else (1, "")
        return (
            f"{self.metric} {self.mean * scale:.4g}{unit} +/- {self.ci95 * scale:.2g}{unit} "
            f"({len(self.values)} episodes, {self.protocol})"
        )


def protocol_of(model: nn.Module) -> Protocol:
    """What the model's normalisation makes of its queries."""
    norm = getattr(model, "norm", None)
    if isinstance(norm, str):
        return "transductive" if norm == "batch" else "inductive"
    batchwise = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return "transductive" if batchwise and model.training else "inductive"


class _QueryAtATime(nn.Module):
    """``model``, each query predicted from the support set and itself; parameters by the same names."""

    uses_support = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = model._parameters, model._buffers
        self._modules = model._modules
        self.wrapped = (model,)  # in a tuple, lest it become a submodule and lend its name

    def forward(self, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        (model,) = self.wrapped
        if support_x is None:
            output: Tensor = model(x)
            return output
        if getattr(model, "uses_support", False):
            return torch.cat([model(query, support_x) for query in x.chunk(len(x))])
        return torch.cat([model(torch.cat([support_x, query]))[-1:] for query in x.chunk(len(x))])


@contextlib.contextmanager
def _under(model: nn.Module, protocol: Protocol) -> Iterator[nn.Module]:
    """The model as a protocol wants it: a batch-normalised one may use the support's statistics."""
    norm: Any = getattr(model, "norm", None)
    if protocol == "query-at-a-time":
        # these normalise each query by itself anyhow, and faster together
        yield model if norm in ("support", "group", "none") else _QueryAtATime(model)
        return
    if protocol_of(model) == protocol:
        yield model
        return
    if norm not in ("batch", "support"):
        raise InputError(
            f"evaluate: protocol '{protocol}' asked, but this model ({type(model).__name__}, "
            f"norm={norm!r}) knows only '{protocol_of(model)}'; drop --protocol"
        )
    model.norm = "support" if protocol == "inductive" else "batch"  # type: ignore[assignment]
    try:
        yield model
    finally:
        model.norm = norm


def evaluate(
    model: nn.Module,
    source: Source,
    learner: Learner,
    episodes: int = 600,
    seed: int | None = 0,
    *,
    meta: Params | None = None,
    protocol: Protocol | None = None,
    tasks_at_once: int = 16,
    progress: Callable[[int], object] | None = None,
    team: Team = ALONE,
) -> Evaluation:
    """Adapt ``model`` to each of a stream of episodes and measure it on their queries.

    Args:
        model: any module; it is not changed.
        source: episodes; an independent stream over the same data is used.
        learner: the inner loop at test time, such as ``MAML(0.4, steps=3)``; second-order terms are
            never computed here.
        episodes: how many, at least 1.
        seed: of the stream; None keeps the source's own state and advances it.
        meta: meta-parameters other than the model's own (learned inner rates).
        protocol: ``transductive``, ``inductive`` or ``query-at-a-time`` (see `Protocol`); by default
            what the model's norm says.
        tasks_at_once: episodes adapted together.
        progress: called with the number of episodes done since its last call.
        team: processes that all call this and share the episodes out; the values are those that one
            process finds (see `gametalearn.distributed.joined`).

    Returns:
        An `Evaluation`, with its mean and 95% interval.
    """
    if episodes < 1:
        raise InputError(f"evaluate: episodes must be at least 1, got {episodes}")
    stream = source if seed is None else source.with_seed(seed)
    device = next(model.parameters()).device
    metric, protocol = "accuracy", protocol or protocol_of(model)
    learner = learner.for_test(learner.steps)
    table = torch.zeros(2, episodes, dtype=torch.float64)  # score and group
    with _under(model, protocol) as tested:
        for number, start in enumerate(range(0, episodes, tasks_at_once)):
            stop = min(start + tasks_at_once, episodes)
            mine = slice(None) if number % team.size == team.rank else slice(0, 0)
            batch = stream.sample(stop - start, mine).to(device)
            metric = "mse" if batch.query_y.is_floating_point() else "accuracy"
            if len(batch):
                _, score = adapt_and_score(tested, batch, learner, meta=meta)
                table[0, start:stop], table[1, start:stop] = score, batch.group
            if progress is not None:
                progress(stop - start)
    values, group = team.total(table)
    return Evaluation(
        values=values.numpy(),
        group=group.to(torch.int64).numpy(),
        metric=metric,
        protocol=protocol,
        seed=-1 if seed is None else seed,
    )


def adapt(
    model: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    learner: Learner,
    *,
    meta: Params | None = None,
    loss: Loss = default_loss,
) -> nn.Module:
    """A copy of ``model`` with the parameters that the inner loop finds for one support set.

    The copy is of the model's own class: use it, or save its ``state_dict``, without gametalearn. A
    batch-normalised model keeps normalising by the batch it is given, and one with
    ``norm="support"`` is called ``copy(query_x, support_x)``; see `gametalearn.models`.

    Args:
        model: any module; it is not changed.
        support_x: ``(S, *x)`` inputs.
        support_y: ``(S,)`` int64 labels, or ``(S, *y)`` float targets.
        learner: the inner loop, such as ``MAML(0.4, steps=3)`` or a run's ``test_learner``.
        meta: meta-parameters other than the model's own: a run's ``meta``, for learned inner rates.
        loss: as in `meta_gradients`.
    """
    if meta is None:
        meta = learner.meta_parameters(model_parameters(model))
    meta = {name: p.detach() for name, p in meta.items()}
    learner = learner.for_test(learner.steps)
    support = support_loss(model, loss, fixed_tensors(model), support_x, support_y)
    adapted = learner.adapt(meta, support, first_order)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model_parameters(result).items():
            p.copy_(adapted[name])
    return result
