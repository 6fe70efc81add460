"""Evaluation: adapt to unseen episodes, one accuracy each, with a confidence interval.

A trained run or any pretrained module is tested and adapted in three lines, and what comes of it is
an ordinary module, whose ``state_dict`` loads where gametalearn is not installed::

    run = load_run("runs/a")
    print(evaluate(run.model, source, run.test_learner, meta=run.meta))
    torch.save(adapt(run.model, x, y, run.test_learner, meta=run.meta).state_dict(), "w.pt")

A run with a loss of its own is tested and adapted with it: ``loss=run.loss``.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from gametalearn.adaptation import Learner, Params, fitted, makes_heads, model_parameters
from gametalearn.copies import copied
from gametalearn.dependence import settled
from gametalearn.distributed import ALONE, Team
from gametalearn.engine.late import refuse_late
from gametalearn.engine.loop import first_order
from gametalearn.engine.state import reaches
from gametalearn.engine.task import (
    fixed_tensors,
    split_head,
    started,
    support_loss,
    swapping,
)
from gametalearn.episodes import Source, TaskBatch, draw
from gametalearn.errors import InputError, require_whole, summary
from gametalearn.gradients import adapt_and_score, explained, meta_of, require_instance
from gametalearn.losses import Loss, default_loss, kind_of
from gametalearn.mixture import MixedSource
from gametalearn.normalisation import Protocol, check_statistics, protocol_of
from gametalearn.peek import score_for
from gametalearn.predictor import WithHead, bake
from gametalearn.records import one_line
from gametalearn.scores import (
    SCORES,
    Format,
    ScoreFunction,
    ScoreLike,
    built_in,
    default_score,
    score_function,
)
from gametalearn.statistics import LARGEST, half_width
from gametalearn.words import counted

B = TypeVar("B", TaskBatch, Tensor)

__all__ = ["Evaluation", "Protocol", "adapt", "ci95", "evaluate", "placed", "protocol_of"]

CHUNK = 16
"""Episodes that are drawn at once, however many are adapted together; of several objectives, about as
many, so that each has the same number."""


def ci95(values: np.ndarray[Any, Any], group: np.ndarray[Any, Any] | None = None) -> float:
    """Half width of the 95% interval of a mean over episodes: 1.96 standard errors.

    With several objectives (``group``) it is that of the mean over objectives, with a stratified
    standard error (`gametalearn.statistics.stratified_error`): the spread between objectives is no
    part of it. 0 where no objective has 2 values, NaN where a value is not finite.
    """
    if not (np.abs(values) <= LARGEST).all():
        return math.nan
    return half_width(values, group) or 0.0


@dataclass(frozen=True)
class Evaluation:
    """Results on E episodes.

    Attributes:
        values: ``(E,)`` float64, the score of each episode (accuracy in [0, 1] or mean squared error
            by default); NaN where the adaptation diverged.
        group: ``(E,)`` int64, the episodes' objectives.
        metric: the score's name, such as ``accuracy`` or ``mse``.
        protocol: how queries were normalised; see `gametalearn.normalisation.Protocol`.
        seed: of the episodes.
        format: how values are shown; by default that of the score of `gametalearn.SCORES` with this
            name, and plain numbers for any other.
    """

    values: np.ndarray[Any, np.dtype[np.float64]]
    group: np.ndarray[Any, np.dtype[np.int64]]
    metric: str
    protocol: Protocol
    seed: int
    format: Format | None = None

    __repr__ = one_line

    @property
    def mean(self) -> float:
        """The mean over episodes; with several objectives, the mean over them."""
        return float(np.mean([v.mean() for v in self.by_group().values()]))

    @property
    def ci95(self) -> float:
        """Half width of the 95% interval of `mean` over episodes; see `gametalearn.evaluation.ci95`."""
        return ci95(self.values, self.group)

    def by_group(self) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]]:
        """The values of each objective."""
        return {int(g): self.values[self.group == g] for g in np.unique(self.group)}

    def of_group(self, group: int) -> Evaluation:
        """The episodes of one objective."""
        own = self.group == group
        return replace(self, values=self.values[own], group=self.group[own])

    @property
    def percent(self) -> bool:
        """Whether values are shown in percent."""
        known = SCORES[self.metric].format if self.metric in SCORES else "number"
        return (self.format or known) == "percent"

    def __str__(self) -> str:
        scale, unit = (100, "%") if self.percent else (1, "")
        if bad := int((~np.isfinite(self.values)).sum()):
            return (
                f"{self.metric} nan: {bad} of {counted(len(self.values), 'episode')} diverged "
                f"({self.protocol})"
            )
        # None where there is nothing to estimate it from, of which `ci95` says 0
        half = half_width(self.values, self.group)
        interval = "" if half is None else f" +/- {half * scale:.2g}{unit}"
        return (
            f"{self.metric} {self.mean * scale:.4g}{unit}{interval} "
            f"({counted(len(self.values), 'episode')}, {self.protocol})"
        )


def evaluate(
    model: nn.Module,
    source: Source,
    learner: Learner,
    episodes: int = 600,
    seed: int | None = 0,
    *,
    meta: Params | None = None,
    loss: Loss = default_loss,
    score: ScoreLike = default_score,
    protocol: Protocol | None = None,
    tasks_at_once: int = 16,
    progress: Callable[[int], object] | None = None,
    team: Team = ALONE,
) -> Evaluation:
    """Adapt ``model`` to each of a stream of episodes and measure it on their queries.

    Dropout is off, whatever mode the model is in: where it has such layers that are on, a copy is
    evaluated; with a loss or score that reads the model, the model itself with these layers off
    meanwhile, in which it should not be trained.

    Args:
        model: any module; it is not changed, and several threads may evaluate it at once. Episodes
            are moved to its device, and their float inputs and targets cast to its precision.
        source: episodes; an independent stream over the same data is used.
        learner: the inner loop at test time, such as ``MAML(0.4, steps=3)``; second-order terms are
            never computed here.
        episodes: how many, at least 1.
        seed: of the stream; None keeps the source's own state and advances it.
        meta: meta-parameters other than the model's own (learned inner rates).
        loss: what is descended on in the inner loop: the one that the model was trained with.
        score: what is reported; as in `meta_gradients`, but where no default fits it must be given.
        protocol: ``transductive``, ``inductive`` or ``query-at-a-time`` (see
            `gametalearn.normalisation.Protocol`); by default what the model does. That is known by
            types for this library's models and for batch normalisation, and measured on the first
            episode otherwise.
        tasks_at_once: episodes adapted together, at least 1; above 16, in multiples of 16 (or of what
            divides equally among several data sets). Memory and
            time depend on it, the episodes do not.
        progress: called with the number of episodes done since its last call.
        team: processes that all call this and split the episodes among them; the values are those that
            one process finds (see `gametalearn.distributed.joined`).

    Returns:
        An `Evaluation`, with its mean and 95% interval.

    Raises:
        InputError: no parameter to adapt, a protocol that the model does not know, running
            statistics that were never estimated, or no score that fits the loss.
    """
    require_instance(learner)
    for name, count in (("episodes", episodes), ("tasks_at_once", tasks_at_once)):
        require_whole(f"evaluate: {name}", count, 1)
    stream = source if seed is None else source.with_seed(seed)
    _warn_of_repeats(source, episodes)
    learner = learner.for_test(learner.steps)
    meta = _trained(model, learner, meta)
    table = torch.zeros(2, episodes, dtype=torch.float64)  # score and group
    period = stream.period if isinstance(stream, MixedSource) else 1
    chunk = period * max(1, CHUNK // period)
    several = chunk * max(1, tasks_at_once // chunk)
    with swapping:
        check_statistics(model)
    with _without_dropout(model, loss, score) as model:
        for number, start in enumerate(range(0, episodes, several)):
            stop = min(start + several, episodes)
            mine = number % team.size == team.rank
            # every process has the first episode, so that all settle the same
            part = slice(None) if mine else slice(0, 1 if number == 0 else 0)
            sizes = [min(chunk, stop - first) for first in range(start, stop, chunk)]
            drawn = [
                draw(stream, size, part if not i or mine else slice(0))
                for i, size in enumerate(sizes)
            ]
            batch = placed(model, TaskBatch.cat(drawn) if len(drawn) > 1 and mine else drawn[0])
            with _half_precision(model):
                if number == 0:
                    chosen = score_for(score, loss, model, learner, meta, batch)
                    found = settled(model, protocol, meta, batch, learner, loss)
                before = torch.random.get_rng_state()
                for first in range(0, len(batch) if mine else 0, tasks_at_once):
                    some = slice(first, first + tasks_at_once)
                    _, values = adapt_and_score(
                        model, batch[some], learner, meta=meta, loss=loss, score=chosen,
                        protocol=protocol,
                    )  # fmt: skip
                    table[0, start:stop][some] = values
                if number == 0 and not torch.equal(before, torch.random.get_rng_state()):
                    _warn_of_chance(model)
            if mine:
                table[1, start:stop] = batch.group
            if progress is not None:
                progress(stop - start)
    scores, group = team.total(table)
    return Evaluation(
        values=scores.numpy(),
        group=group.to(torch.int64).numpy(),
        metric=chosen.name,
        protocol=found,
        seed=-1 if seed is None else seed,
        format=chosen.format,
    )


DROPS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.MultiheadAttention, nn.RNNBase, nn.RReLU,
)  # fmt: skip
"""Layers that draw random numbers in training mode, if they are set to, and in eval mode never do."""


_off: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Layers that are switched off for a test of the model itself, and for how many tests at once."""


@contextlib.contextmanager
def _without_dropout(model: nn.Module, loss: Loss, score: ScoreLike) -> Iterator[nn.Module]:
    """Within, the model with dropout off: a copy in which it is, if it has any that is on.

    For a loss or score that reads the model it is the model itself, its dropout off for as long as this lasts.
    """
    with swapping:
        on = [m for m in model.modules() if _drops(m) or _off.get(m)]
        if not on:
            tested = model
        elif not _read_by(model, loss, score_function(score)):
            tested, on = copied(model), []
            for module in filter(_drops, list(tested.modules())):
                module.train(False)
        else:
            tested = model
        for module in on:
            _off[module] = _off.get(module, 0) + 1
            module.training = False
    try:
        yield tested
    finally:
        with swapping:
            for module in on:
                _off[module] -= 1
                module.training = not _off[module]


def _read_by(model: nn.Module, *parts: Loss | ScoreFunction) -> bool:
    """Whether one of some losses and scores may read the model: a penalty, or what a forward left there."""
    own = [part for part in parts if kind_of(part) is None and not built_in(part)]
    return any(reaches(part, model.modules()) for part in own)


def _trained(model: nn.Module, learner: Learner, meta: Params | None) -> Params:
    """The meta-parameters for a test; a warning where rates that are learned would be those of the start."""
    found = meta_of(model, learner, meta)
    if meta is None and found.keys() - model_parameters(model).keys():
        warnings.warn(
            f"{type(learner).__name__} learns inner rates, and without meta= those that it starts with are "
            "tested; pass the trained ones, such as a run's meta",
            stacklevel=3,
        )
    return found


def _drops(module: nn.Module) -> bool:
    share = getattr(module, "p", getattr(module, "dropout", 1.0))
    return isinstance(module, DROPS) and module.training and share != 0


def _warn_of_repeats(source: Source, episodes: int) -> None:
    distinct = getattr(source, "distinct", None)
    if isinstance(distinct, int) and episodes > distinct:
        warnings.warn(
            f"evaluate: {episodes} episodes of a source of {distinct} tasks, so that tasks repeat: the interval holds "
            "for these tasks alone, and is too narrow for others like them; let the source have more tasks, or test "
            "on fewer episodes",
            stacklevel=3,
        )


def _warn_of_chance(model: nn.Module) -> None:
    warnings.warn(
        f"{type(model).__name__} draws random numbers while it is tested, by something other than a "
        "dropout layer of PyTorch's, so that the same episodes may give another score; switch it off for "
        "tests",
        stacklevel=3,
    )


def _floats(model: nn.Module) -> torch.dtype | None:
    """The one precision of a model's parameters; None if there are several."""
    with swapping:
        found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def placed(model: nn.Module, batch: B) -> B:
    """A batch or a tensor on the model's device, its floats in the model's precision."""
    dtype = _floats(model)
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        dtype = None
    with swapping:
        device = next(model.parameters()).device
    return batch.to(device, dtype)


@contextlib.contextmanager
def _half_precision(model: nn.Module) -> Iterator[None]:
    """Say what to do where a device cannot compute in half precision."""
    try:
        yield
    except RuntimeError as error:
        dtype = _floats(model)
        if dtype not in (torch.float16, torch.bfloat16) or "not implemented" not in str(error):
            raise
        raise InputError(
            f"{type(model).__name__} is in {str(dtype).removeprefix('torch.')}, and "
            f"{next(model.parameters()).device} cannot compute with that ({summary(error)}); use "
            "model.float(), or a device that can"
        ) from error


def adapt(
    model: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    learner: Learner,
    *,
    meta: Params | None = None,
    loss: Loss = default_loss,
    protocol: Literal["inductive", "transductive"] = "inductive",
) -> nn.Module:
    """A copy of ``model`` with the parameters that the inner loop finds for one support set.

    The copy's prediction for an input does not depend on the other inputs of a call: batch
    normalisation uses the support set's statistics under the adapted weights (mean, and biased variance
    as in training mode), which are stored in its buffers as running statistics; ``train()`` does not
    bring the batch's back. For the library's models that is what `evaluate` tests with ``protocol="inductive"``.
    Batch normalisation in eval mode keeps the running statistics that it has. Dropout is off, while it
    adapts and in the copy, until ``train()`` is called on that. Other layers are what they were.

    The copy is of the model's own class, with layers of PyTorch's (a `gametalearn.models.TaskNorm` has
    become a `torch.nn.BatchNorm2d`), and needs no gametalearn where it is used. This is tried by
    the library's tests:

    - its ``state_dict`` in plain layers of PyTorch in eval mode, or in `Conv4` and `ResNet12` with
      ``norm="frozen"``;
    - ``torch.save(copy)`` of a model of your own: batch norm layers are PyTorch's when it is loaded, in
      eval mode;
    - ``torch.export.save(torch.export.export(copy, (x,)), file)``, also for any number of images (by
      ``dynamic_shapes``);
    - ``torch.onnx.export(copy, (x,), dynamo=True)``, run by onnxruntime 1.32: one image at a time it was
      within 2e-6 of the copy, in float32.

    Args:
        model: any module; it is not changed. The support set is moved to its device, and floats cast to
            its precision. A tensor that its forward keeps is a constant in the copy.
        support_x: ``(S, *x)`` inputs.
        support_y: ``(S,)`` int64 labels, or ``(S, *y)`` float targets.
        learner: the inner loop, such as ``MAML(0.4, steps=3)`` or a run's ``test_learner``.
        meta: meta-parameters other than the model's own: a run's ``meta``, for learned inner rates.
        loss: as in `meta_gradients`.
        protocol: ``"inductive"``, as above; or ``"transductive"``: the copy normalises as the model
            does, by the batch that it is given, and one with ``norm="support"`` is called
            ``copy(query_x, support_x)``. A model of your own with ``uses_support`` always is.

    Returns:
        The copy; for a learner that makes heads (`gametalearn.prototypes`) a module of the copy,
        ``embedding``, and the task's ``head``.

    Raises:
        InputError: no parameter requires gradients: there is nothing to adapt. Or the predictions of
            an inductive copy would still depend on each other: by something in the forward that is no
            batch norm layer (which is measured, on the support set), or by a layer that runs several
            times in one.
    """
    if protocol not in ("inductive", "transductive"):
        raise InputError(
            f"adapt: protocol must be 'inductive' or 'transductive', got {protocol!r}; for one query "
            "at a time in a batch with the support set, use evaluate"
        )
    _require_examples(support_x, support_y)
    meta = _trained(model, learner, meta)
    learner = fitted(learner.for_test(learner.steps), support_y)
    with torch.inference_mode(False), _half_precision(model), explained(model, support_x):
        with swapping:
            result = copied(model)
        for module in filter(_drops, list(result.modules())):
            module.train(False)
        # What a forward writes down stays in a copy, unless the loss reads it on the model.
        scratch = model if _read_by(model, loss) else copied(result)
        start = {name: p.detach().clone() for name, p in meta.items()}
        x, y = (placed(model, t).clone() for t in (support_x, support_y))
        with _without_dropout(scratch, loss, default_score) as tested:
            fixed = fixed_tensors(tested, meta)
            refuse_late(tested, learner, loss, meta, x, y)
            support = support_loss(tested, learner, loss, fixed, x, y)
            with torch.no_grad():
                begin = started(tested, learner, start, fixed, x, y)
            adapted = learner.adapt(begin, support, first_order)
        head = split_head(adapted)[1] if makes_heads(learner) else {}
        with torch.no_grad():
            for name, p in model_parameters(result).items():
                if name in adapted:
                    p.copy_(adapted[name])
        if protocol == "inductive":
            bake(result, x)
    return WithHead(result, learner, head) if head else result


def _require_examples(support_x: Tensor, support_y: Tensor) -> None:
    """Raise an `InputError` for what is no tensor of inputs with a target for each."""
    for name, value in (("support_x", support_x), ("support_y", support_y)):
        if not isinstance(value, Tensor) or not value.ndim:
            got = f"a {type(value).__name__}" + " of a single number" * isinstance(value, Tensor)
            raise InputError(
                f"adapt: {name} must be a tensor, examples first, got {got}; make it one "
                "with torch.as_tensor, or torch.stack of a list"
            )
    if len(support_x) != len(support_y):
        raise InputError(
            f"adapt: {len(support_x)} inputs in support_x and {len(support_y)} targets in support_y; give one for each"
        )
