"""Evaluation: adapt to unseen episodes, one accuracy each, with a confidence interval."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gametalearn.adaptation import Learner, Params
from gametalearn.episodes import Source
from gametalearn.errors import InputError
from gametalearn.gradients import adapt_and_score

__all__ = ["Evaluation", "Protocol", "ci95", "evaluate", "protocol_of"]

Protocol = Literal["transductive", "inductive"]


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


@contextlib.contextmanager
def _under(model: nn.Module, protocol: Protocol) -> Iterator[None]:
    """Let a batch-normalised model use the support set's statistics, or the other way round."""
    if protocol_of(model) == protocol:
        yield
        return
    norm: Any = getattr(model, "norm", None)
    if norm not in ("batch", "support"):
        raise InputError(
            f"evaluate: protocol '{protocol}' asked, but this model ({type(model).__name__}, "
            f"norm={norm!r}) knows only '{protocol_of(model)}'; drop --protocol"
        )
    model.norm = "support" if protocol == "inductive" else "batch"  # type: ignore[assignment]
    try:
        yield
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
        protocol: ``transductive`` or ``inductive``; by default what the model's norm says.
        tasks_at_once: episodes adapted together.
        progress: called with the number of episodes done since its last call.

    Returns:
        An `Evaluation`, with its mean and 95% interval.
    """
    if episodes < 1:
        raise InputError(f"evaluate: episodes must be at least 1, got {episodes}")
    stream = source if seed is None else source.with_seed(seed)
    device = next(model.parameters()).device
    values, groups, metric = [], [], "accuracy"
    protocol = protocol or protocol_of(model)
    learner = learner.for_test(learner.steps)
    with _under(model, protocol):
        for start in range(0, episodes, tasks_at_once):
            batch = stream.sample(min(tasks_at_once, episodes - start)).to(device)
            _, score = adapt_and_score(model, batch, learner, meta=meta)
            metric = "mse" if batch.query_y.is_floating_point() else "accuracy"
            values.append(score.double().cpu())
            groups.append(batch.group.cpu())
            if progress is not None:
                progress(len(batch))
    return Evaluation(
        values=torch.cat(values).numpy(),
        group=torch.cat(groups).numpy(),
        metric=metric,
        protocol=protocol,
        seed=-1 if seed is None else seed,
    )
