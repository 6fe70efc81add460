"""Losses: the default one, which shapes a loss accepts, and what its errors mean.

A loss is any function ``loss(prediction, target)`` that gives a scalar tensor, a mean over the
examples; the prediction is whatever the model returns. PyTorch broadcasts a target ``(B,)`` against a
prediction ``(B, 1)`` and so compares every example with every other: such losses are refused here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.registry import name_of

__all__ = [
    "Loss",
    "apply_loss",
    "class_dimension",
    "default_loss",
    "ignored_label",
    "kind_of",
    "name_of",
]

Loss = Callable[[Any, Tensor], Tensor]
"""``loss(prediction, target)``: a scalar tensor, the mean over a task's examples."""

Kind = Literal["default", "cross-entropy", "binary", "squared", "absolute", "robust"]


def default_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy for integer targets, mean squared error for floating-point ones.

    Args:
        prediction: ``(B, C)`` logits, or ``(B, C, *d)`` with a label at each position; for float
            targets, of the shape of the target.
        target: ``(B,)`` or ``(B, *d)`` int64 labels in [0, C), or ``(B, *y)`` floats.

    Raises:
        InputError: the prediction is not a tensor, or a float target has another shape.
    """
    _check(default_loss, prediction, target)
    if target.is_floating_point():
        return F.mse_loss(prediction, target)
    return F.cross_entropy(prediction, target)


_KINDS: tuple[tuple[Any, Kind], ...] = (
    (default_loss, "default"),
    (F.cross_entropy, "cross-entropy"),
    (nn.CrossEntropyLoss, "cross-entropy"),
    (F.binary_cross_entropy_with_logits, "binary"),
    (nn.BCEWithLogitsLoss, "binary"),
    (F.mse_loss, "squared"),
    (nn.MSELoss, "squared"),
    (F.l1_loss, "absolute"),
    (nn.L1Loss, "absolute"),
    (F.smooth_l1_loss, "robust"),
    (nn.SmoothL1Loss, "robust"),
    (F.huber_loss, "robust"),
    (nn.HuberLoss, "robust"),
)


def kind_of(loss: object) -> Kind | None:
    """Which of PyTorch's losses this is: the function, its module or a `functools.partial` of it.

    None for any other: what a function of the user's own computes cannot be seen.

    >>> kind_of(nn.L1Loss()), kind_of(functools.partial(F.cross_entropy, label_smoothing=0.1))
    ('absolute', 'cross-entropy')
    """
    if isinstance(loss, functools.partial):
        return None if loss.args else kind_of(loss.func)
    for known, kind in _KINDS:
        # of a module's subclass, only if it computes the same
        of_module = isinstance(known, type) and isinstance(loss, known)
        if of_module and vars(known)["forward"] is getattr(type(loss), "forward", None):
            return kind
        if loss is known and not isinstance(known, type):
            return kind
    return None


def ignored_label(loss: object) -> int:
    """The label whose positions a cross-entropy leaves out; PyTorch's default is -100."""
    if isinstance(loss, functools.partial):
        return int(loss.keywords.get("ignore_index", ignored_label(loss.func)))
    return int(loss.ignore_index) if isinstance(loss, nn.CrossEntropyLoss) else -100


def class_dimension(prediction: Tensor, target: Tensor) -> int | None:
    """Where the logits of a prediction stand if the target holds labels: dimension 1 or the last.

    ``(B, C)`` and ``(B, C, *d)`` have them in dimension 1, as `torch.nn.functional.cross_entropy`
    wants it, and ``(B, *d, C)`` in the last, as sequence models give them; ``d`` are the positions
    that have a label each. None where neither fits, or both (``(B, 5, 5)`` for labels ``(B, 5)``).
    """
    shape, wanted = tuple(prediction.shape), tuple(target.shape)
    if len(shape) != len(wanted) + 1:
        return None
    first, last = shape[:1] + shape[2:] == wanted, shape[:-1] == wanted
    if first and (not last or len(shape) == 2):
        return 1
    return len(shape) - 1 if last and not first else None


def apply_loss(loss: Loss, prediction: Any, target: Tensor) -> Tensor:
    """``loss(prediction, target)``, where its shapes do not lie and its labels have outputs.

    Raises:
        InputError: a loss that compares elements (see `kind_of`) is given two shapes, or a tensor
            loss something that is no tensor; the loss fails, and a label has no output; or it gives
            something else than a scalar.
    """
    if isinstance(loss, type):
        raise InputError(
            f"loss {name_of(loss)} is a class; pass an instance, such as {loss.__name__}()"
        )
    _check(loss, prediction, target)
    try:
        value = loss(prediction, target)
    except (IndexError, RuntimeError) as error:
        _of_labels(loss, target, error)
        label = _label_without_output(prediction, target, ignored_label(loss))
        if label is None:
            raise
        outputs = prediction.shape[class_dimension(prediction, target)]
        has = f"{outputs} outputs, for the labels 0 to {outputs - 1}"
        if outputs == 1:
            has = "1 output, for the label 0"
        raise InputError(
            f"label {label}, but the model has {has}; give it an output for each label, or sample "
            f"episodes of {outputs} ways"
        ) from error
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"loss {name_of(loss)} must give a scalar tensor for a task's examples, got {got}; take its mean"
        )
    return value


def _of_labels(loss: object, target: Tensor, error: Exception) -> None:
    """Raise an `InputError` for labels of another type than a cross-entropy takes."""
    kind = str(target.dtype).removeprefix("torch.")
    if kind_of(loss) in ("default", "cross-entropy") and kind in ("bool", "int8", "int16", "int32"):
        raise InputError(
            f"the labels are {kind}, which {name_of(loss)} does not take; make them int64 with labels.long()"
        ) from error


def _check(loss: object, prediction: Any, target: Tensor) -> None:
    kind = kind_of(loss)
    if kind is None:
        return
    if not isinstance(prediction, Tensor):
        raise InputError(
            f"the model's prediction is a {type(prediction).__name__}, and {name_of(loss)} takes a "
            "tensor; pass loss=, a function of (prediction, target) that takes the tensor out of it"
        )
    elementwise = kind in ("squared", "absolute", "robust")
    if kind == "default":
        elementwise = target.is_floating_point()
    if elementwise and prediction.shape != target.shape:
        raise InputError(
            f"the prediction has the shape {tuple(prediction.shape)} and the target "
            f"{tuple(target.shape)} ({str(target.dtype).removeprefix('torch.')}): "
            f"{name_of(loss)} would compare every example with every other; give both the same shape"
            + (", or make class labels integers" if kind == "default" else "")
        )


def _label_without_output(prediction: Any, target: Tensor, ignored: int) -> int | None:
    """A label that is not among the classes; None if there is none, or it cannot be read."""
    if not isinstance(prediction, Tensor) or target.is_floating_point():
        return None
    dimension = class_dimension(prediction, target)
    if dimension is None:
        return None
    try:
        bad = (target != ignored) & ((target < 0) | (target >= prediction.shape[dimension]))
        return int(target[bad][0]) if bool(bad.any()) else None
    except Exception:  # a tracer's tensors have no values, and the device may have gone wrong
        return None
