"""A look at a model's prediction that leaves nothing behind: no random number, buffer or graph."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gametalearn.adaptation import Learner, Params, fitted, model_parameters
from gametalearn.engine.swap import swapped
from gametalearn.engine.task import fixed_tensors, predicted, started, swapping
from gametalearn.episodes import TaskBatch
from gametalearn.losses import Loss, default_loss
from gametalearn.normalisation import statistics_of
from gametalearn.randomness import undisturbed
from gametalearn.scores import SCORES, Score, ScoreLike, as_score, default_score, settled

__all__ = ["own_parameters", "score_for", "written_buffers"]


def own_parameters(model: nn.Module, meta: Params) -> Params:
    """Of the meta-parameters, those of the model: no learned rates."""
    names = model_parameters(model)
    return {n: p.detach() for n, p in meta.items() if n in names}


def written_buffers(model: nn.Module, meta: Params, task: TaskBatch) -> list[str]:
    """The buffers that a forward changes, running statistics of norms apart; the model is as before.

    Args:
        model: predicts the support set of the first task, once, in the mode that it is in.
        meta, task: as in `score_for`.
    """
    x = task.support_x[0]
    with swapping, undisturbed(x.device), torch.inference_mode(False), torch.no_grad():
        own = {n: p.clone() for n, p in own_parameters(model, meta).items()}
        before, found = fixed_tensors(model, own), []
        copies = {n: t.clone() for n, t in before.items()}
        # what fails here, training reports
        with contextlib.suppress(Exception), swapped(model, {**copies, **own}):
            model(x.clone())
            written = {
                n for n, t in model.named_buffers() if n in before and not _same(t, before[n])
            }
            found = sorted(written - statistics_of(model))
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers; those of a sparse layout count as the same."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.layout != torch.strided or other.layout != torch.strided:
        return one.layout == other.layout
    return bool(((one == other) | ((one != one) & (other != other))).all())


def score_for(
    score: ScoreLike,
    loss: Loss,
    model: nn.Module,
    learner: Learner,
    meta: Params,
    task: TaskBatch,
) -> Score:
    """The `Score` that a run or a test goes by, settled before anything is adapted.

    Args:
        score, loss: as in `gametalearn.meta_gradients`.
        model: is not changed; it predicts the queries of the first task, once, if the loss is not
            the default one and the score is.
        learner: is asked for a prediction where it makes a head.
        meta: the meta-parameters.
        task: one task or more, on the model's device.

    Raises:
        InputError: no default score fits; pass one.
    """
    found = as_score(score)
    if found is not None:
        return found
    target = task.query_y[0]
    if loss is default_loss:
        named = SCORES["mse" if target.is_floating_point() else "accuracy"]
        return dataclasses.replace(named, function=default_score)
    with swapping, undisturbed(target.device), torch.inference_mode(False), torch.no_grad():
        own, learner = own_parameters(model, meta), fitted(learner, task.support_y)
        support_x, fixed = task.support_x[0], fixed_tensors(model, own)
        begin = started(model, learner, own, fixed, support_x, task.support_y[0])
        prediction: Any = predicted(model, learner, begin, task.query_x[0], support_x, fixed)
    return settled(score, loss, prediction, target)
