"""Scores: how well a task's queries are predicted, beside the loss that is differentiated.

A score is a function of a prediction and a target that gives a scalar tensor. `SCORES` names the
usual ones. The default is chosen from the loss and from types and shapes, never from what a function
of the user's own might mean; where none fits, it is NaN:

==============================  ===============================================  ==================
loss                            targets and predictions                          default score
==============================  ===============================================  ==================
default, cross-entropy          integer ``(B, *d)``, logits ``(B, C, *d)``       accuracy
BCE with logits                 0 or 1, logits of the same shape                 binary-accuracy,
                                                                                 multilabel-accuracy
default, mean squared error     same shapes (default: float targets)             mse
mean absolute error             same shapes                                      mae
any other                       integer ``(B,)``, logits ``(B, C)``, C >= 2      accuracy
any other                       integer ``(B, *d)``, logits ``(B, C, *d)`` or    accuracy
                                ``(B, *d, C)``, where one of the two alone fits
==============================  ===============================================  ==================

Losses are recognised as PyTorch's function, its module, or a `functools.partial` of the function.
Labels of a cross-entropy's ``ignore_index`` (-100 for any other loss) are left out; a label that is
no class makes an accuracy NaN, as does a target other than 0 and 1 where those are expected.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.losses import (
    Loss,
    class_dimension,
    default_loss,
    ignored_label,
    kind_of,
    name_of,
)
from gametalearn.trees import mapped
from gametalearn.words import did_you_mean

__all__ = [
    "RESERVED",
    "SCORES",
    "Format",
    "Score",
    "ScoreFunction",
    "ScoreLike",
    "as_score",
    "built_in",
    "default_for",
    "default_score",
    "measured",
    "score_function",
    "settled",
]

RESERVED = {
    "best_iteration", "budget", "by_seed", "ci95", "ci95_episodes", "delta_m", "diagnostics",
    "effective", "episodes", "group", "inner_steps", "iteration", "loss", "losses", "mean_rank",
    "metric", "minus_single", "objectives", "protocol", "protocols", "raw", "rule", "runs",
    "schema", "scores", "seconds", "seed", "seeds", "skipped", "spoiled", "tasks", "validation",
    "values",
}  # fmt: skip
"""What the files of a run call something else; a score needs another name."""

ScoreFunction = Callable[[Any, Tensor], Tensor]
"""``function(prediction, target)``: a scalar tensor."""

Format = Literal["percent", "number"]


@dataclass(frozen=True)
class Score:
    """A score with its name and direction.

    Attributes:
        name: in metrics, tables and files.
        function: ``function(prediction, target)`` gives a scalar tensor; the prediction is what the
            model returns for a task's queries, detached.
        higher_is_better: which of two validations is the better one.
        format: how a value is shown: ``"percent"``, for values in [0, 1], or ``"number"``.

    >>> f1 = Score("f1", lambda p, t: 2 * ((p > 0) & (t > 0)).sum() / ((p > 0).sum() + t.sum()))
    >>> f1.function(torch.tensor([2.0, 1.0, -1.0]), torch.tensor([1, 0, 0]))
    tensor(0.6667)
    """

    name: str
    function: ScoreFunction
    higher_is_better: bool = True
    format: Format = "number"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or not self.name.isprintable():
            raise InputError(f"Score: name must be printable text, got {self.name!r}")
        if not callable(self.function):
            raise InputError(
                f"Score '{self.name}': function must be callable as function(prediction, target), "
                f"got a {type(self.function).__name__}"
            )
        if self.format not in get_args(Format):
            raise InputError(
                f"Score '{self.name}': format must be one of {', '.join(get_args(Format))}; "
                f"got {self.format!r}"
            )

    def show(self, value: float | None) -> str:
        """A value as messages show it; None stands for one that is not finite.

        >>> SCORES["accuracy"].show(0.79935), SCORES["mse"].show(0.123456), SCORES["mse"].show(None)
        ('79.94%', '0.1235', 'not finite')
        """
        if value is None or not math.isfinite(value):
            return "not finite"
        return f"{100 * value:z.2f}%" if self.format == "percent" else f"{value:z.4g}"


ScoreLike = str | Score | ScoreFunction
"""What ``score=`` takes: a name of `SCORES`, a `Score`, or a function, which goes by its own name."""


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of labels ``(B, *d)`` whose logit is the largest of ``(B, C, *d)``, in [0, 1].

    Labels of -100 are left out; NaN where another label is not in [0, C), or none is left.
    """
    _need_tensor("accuracy", prediction)
    shape = tuple(prediction.shape)
    if _is_real(target) or shape[:1] + shape[2:] != tuple(target.shape) or len(shape) < 2:
        raise _misfit(
            "accuracy", "integer labels (B, *d) and logits (B, C, *d)", prediction, target
        )
    return _class_accuracy(prediction, target, 1, -100)


def binary_accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of targets 0 or 1 whose logit has their side of zero, one logit for each example.

    Both are ``(B,)`` or ``(B, 1)``; a logit of 0 stands for 0. NaN where a target is neither.
    """
    _need_tensor("binary-accuracy", prediction)
    shapes = {(len(target),), (len(target), 1)}
    if tuple(prediction.shape) not in shapes or tuple(target.shape) not in shapes:
        raise _misfit("binary-accuracy", "one logit and one target each", prediction, target)
    return _sign_accuracy(prediction.flatten(), target.flatten())


def multilabel_accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of targets ``(B, L)``, each 0 or 1, whose logit ``(B, L)`` has their side of zero.

    Any further dimensions are averaged over too; NaN where a target is neither 0 nor 1.
    """
    _need_same("multilabel-accuracy", prediction, target)
    return _sign_accuracy(prediction, target)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of two tensors of one shape."""
    _need_same("mse", prediction, target)
    return F.mse_loss(prediction, target.to(prediction.dtype))


def mae(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean absolute difference of two tensors of one shape."""
    _need_same("mae", prediction, target)
    return F.l1_loss(prediction, target.to(prediction.dtype))


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("accuracy", accuracy, True, "percent"),
        Score("binary-accuracy", binary_accuracy, True, "percent"),
        Score("multilabel-accuracy", multilabel_accuracy, True, "percent"),
        Score("mse", mse, False),
        Score("mae", mae, False),
    )
}
"""The scores that ``score=`` knows by name."""


def default_score(prediction: Any, target: Tensor, loss: Loss = default_loss) -> Tensor:
    """The score that goes with a loss, NaN where none does; see the table at the top of the module.

    As ``score=default_score`` it stands for this choice: ``loss`` is then the one of the call.
    """
    chosen = default_for(loss, prediction, target)
    if chosen is None:
        return torch.full((), float("nan"), device=target.device)
    return chosen.function(prediction, target)


def default_for(loss: Loss, prediction: Any, target: Tensor) -> Score | None:
    """The score that `default_score` computes, decided from types and shapes alone; None for NaN."""
    if not isinstance(prediction, Tensor) or not prediction.is_floating_point():
        return None
    kind, same = kind_of(loss), prediction.shape == target.shape
    if kind == "default":
        kind = "squared" if target.is_floating_point() else "cross-entropy"
    if kind == "squared":
        return SCORES["mse"] if same else None
    if kind == "absolute":
        return SCORES["mae"] if same else None
    if kind == "binary":
        one = prediction.numel() == len(target)
        name = "binary-accuracy" if one else "multilabel-accuracy"
        return dataclasses.replace(SCORES[name], function=_sign_accuracy) if same else None
    if kind == "robust" or _is_real(target) or target.dtype == torch.bool or not target.ndim:
        return None
    dimension = class_dimension(prediction, target)
    if kind == "cross-entropy":
        shape = tuple(prediction.shape)
        dimension = 1 if shape[:1] + shape[2:] == tuple(target.shape) else None
    elif dimension is not None and prediction.shape[dimension] < 2:
        return None
    if dimension is None:
        return None
    return dataclasses.replace(
        SCORES["accuracy"],
        function=functools.partial(
            _class_accuracy, dimension=dimension, ignored=ignored_label(loss)
        ),
    )


def as_score(score: ScoreLike) -> Score | None:
    """What ``score=`` was given, as a `Score`; None for `default_score`, which depends on the rest.

    A function goes by its name, and more is better, unless it is one of PyTorch's losses.

    Raises:
        InputError: an unknown name, or neither a name nor a function.
    """
    if score is default_score:
        return None
    if isinstance(score, Score):
        return score
    if isinstance(score, str):
        if score in SCORES:
            return SCORES[score]
        raise InputError(
            f"unknown score '{score}'; {did_you_mean(score, SCORES)}known: {', '.join(SCORES)}, or "
            "pass a function of (prediction, target)"
        )
    if not callable(score):
        raise InputError(
            f"score must be one of {', '.join(SCORES)}, a Score or a function of (prediction, "
            f"target); got a {type(score).__name__}"
        )
    named = score.func if isinstance(score, functools.partial) else score
    name = getattr(named, "__name__", type(named).__name__)
    error = kind_of(score) is not None or isinstance(score, nn.modules.loss._Loss)
    return Score(name, score, higher_is_better=not error)


def score_function(score: ScoreLike) -> ScoreFunction:
    """The function behind ``score=``; `default_score` itself for the default."""
    found = as_score(score)
    return default_score if found is None else found.function


def settled(score: ScoreLike, loss: Loss, prediction: Any, target: Tensor) -> Score:
    """The `Score` that a run or a test goes by, found on one task's queries.

    Args:
        score: as given; the default is chosen now, and is `default_score` by name and direction.
        loss: the loss.
        prediction, target: of the queries of a task, or of those like it.

    Raises:
        InputError: no default fits.
    """
    found = as_score(score)
    if found is not None:
        return found
    chosen = default_for(loss, prediction, target)
    if chosen is None or bool(
        torch.isnan(chosen.function(torch.zeros_like(prediction), target)).all()
    ):
        raise InputError(no_default(loss))
    return dataclasses.replace(chosen, function=default_score)


def no_default(loss: Loss) -> str:
    """What is said where `default_score` is NaN."""
    return (
        f"no default score fits the loss {name_of(loss)} with these predictions and targets; pass "
        f"score=, one of {', '.join(SCORES)} (gametalearn.SCORES), a Score, or a function of "
        "(prediction, target)"
    )


def built_in(score: ScoreFunction) -> bool:
    """Whether a score's function is one of this module, which reads the prediction and target alone."""
    return score is default_score or any(score is known.function for known in SCORES.values())


def measured(score: ScoreFunction, loss: Loss, prediction: Any, target: Tensor) -> Tensor:
    """The score of one task, a detached scalar, whatever the model's prediction is made of.

    Raises:
        InputError: the function gave something else.
    """
    prediction = mapped(Tensor.detach, prediction)
    if score is default_score:
        value: Any = default_score(prediction, target, loss)
    else:
        value = score(prediction, target)
    if not isinstance(value, Tensor) or value.ndim:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"score {name_of(score)} must give a scalar tensor for a task's queries, got {got}; "
            "take its mean"
        )
    return value.detach() if value.is_floating_point() else value.detach().float()


def _class_accuracy(prediction: Tensor, target: Tensor, dimension: int, ignored: int) -> Tensor:
    dtype, kept = _wide(prediction), target != ignored
    right = (prediction.argmax(dimension) == target) & kept
    known = ((target >= 0) & (target < prediction.shape[dimension])) | ~kept
    share = right.sum().to(dtype) / kept.sum().to(dtype)
    return torch.where(known.all(), share, float("nan"))


def _sign_accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    right = (prediction > 0) == (target == 1)
    known = (target == 0) | (target == 1)
    return torch.where(known.all(), right.to(_wide(prediction)).mean(), float("nan"))


def _wide(prediction: Tensor) -> torch.dtype:
    """A share of 75 has no place in bfloat16."""
    return torch.promote_types(prediction.dtype, torch.float32)


def _is_real(target: Tensor) -> bool:
    return target.is_floating_point() or target.is_complex()


def _need_tensor(name: str, prediction: Any) -> None:
    if not isinstance(prediction, Tensor):
        raise InputError(
            f"score '{name}' takes a tensor, and the model's prediction is a "
            f"{type(prediction).__name__}; pass score=, a function that takes the tensor out of it"
        )


def _need_same(name: str, prediction: Any, target: Tensor) -> None:
    _need_tensor(name, prediction)
    if prediction.shape != target.shape:
        raise _misfit(name, "a prediction of the target's shape", prediction, target)


def _misfit(name: str, wanted: str, prediction: Tensor, target: Tensor) -> InputError:
    return InputError(
        f"score '{name}' needs {wanted}; got the prediction {tuple(prediction.shape)} and the "
        f"target {tuple(target.shape)} {str(target.dtype).removeprefix('torch.')}"
    )
