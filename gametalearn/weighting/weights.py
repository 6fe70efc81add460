"""What every weighting rule returns, and the forms of gradients that rules accept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.records import one_line

__all__ = [
    "Gradients",
    "Rule",
    "Weights",
    "as_rows",
    "as_weights",
    "check_finite",
    "check_gramian",
    "check_tensor",
    "largest_entries",
    "require_rule",
]

TaskGradient = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]
"""One task's gradient: a tensor, or tensors by position or name; None is a zero gradient."""

Gradients = Tensor | Sequence[TaskGradient]
"""A ``(T, P)`` tensor, or T per-task gradients of equal structure."""


@dataclass(frozen=True)
class Weights:
    """The weights of one meta-batch, in the dtype and on the device of the rows.

    Attributes:
        raw: the weights as the paper defines them: ``(T,)`` for a rule over tasks; ``(K,)`` for a
            rule over objectives, in the order that the rule was given them in, absent ones too.
        effective: ``(T,)``, those for which the meta-update is ``sum_i effective_i * rows_i``.
    """

    raw: Tensor
    effective: Tensor

    __repr__ = one_line


class Rule(Protocol):
    """A weighting rule: an `nn.Module` that maps `TaskGradients` to `Weights`, or to one tensor ``(T,)``.

    State is what ``state_dict()`` holds; ``eval()`` freezes it. A rule may offer a method
    ``over_processes`` for runs of several processes (see `gametalearn.weighting.sharded`), and have
    ``facts``, a dictionary of tensors ``(K,)`` about the objectives of the last meta-batch (NaN for an
    absent one), which are written to ``metrics.jsonl``.
    """

    def __call__(self, gradients: TaskGradients) -> Weights:
        """The weights of one meta-batch; learnable and running state may advance."""
        ...


def require_rule(given: object, what: str, kinds: str = "a rule") -> None:
    """Raise an `InputError` for what cannot be asked for weights: a name, a class, a number, ...

    Args:
        given: perhaps a rule.
        what: the argument that it was given for.
        kinds: what that argument may be.
    """
    if any(part.__module__.startswith("torchjd.") for part in type(given).__mro__):
        raise InputError(
            f"{what} is a {type(given).__name__} for TorchJD, which takes a matrix; pass a rule, such "
            "as gametalearn.make_rule('torchjd:UPGrad') for one of TorchJD's own"
        )
    if callable(given) and not isinstance(given, type):
        return
    got, remedy = f"a {type(given).__name__}", "pass one, such as GradientAgreement()"
    if isinstance(given, str):
        got, remedy = f"the name '{given}'", f"make it: gametalearn.make_rule('{given}')"
    elif isinstance(given, type):
        got, remedy = f"the class {given.__name__}", f"make one: {given.__name__}(...)"
    raise InputError(f"{what} must be {kinds}; got {got}; {remedy}")


def as_weights(result: object, gradients: TaskGradients, name: str) -> Weights:
    """What a rule gave, as `Weights`; a tensor ``(T,)`` is both kinds.

    Args:
        result: what the rule returned.
        gradients: what it was called with.
        name: the rule's.

    Raises:
        InputError: no `Weights`, or not one effective weight for each task.
    """
    rows = gradients.rows
    given: Any = Weights(raw=result, effective=result) if isinstance(result, Tensor) else result
    effective = getattr(given, "effective", given)
    if not isinstance(effective, Tensor) or effective.shape != (len(rows),):
        got = tuple(effective.shape) if isinstance(effective, Tensor) else type(effective).__name__
        raise InputError(
            f"rule {name}: expected weights of shape ({len(rows)},), got {got}; return them as a tensor or "
            "as Weights"
        )
    raw = getattr(given, "raw", None)
    return Weights(raw=raw if isinstance(raw, Tensor) else effective, effective=effective)


def as_rows(gradients: Gradients) -> Tensor:
    """Flatten T per-task gradients into a ``(T, P)`` tensor; a tensor passes through.

    Raises:
        InputError: no task, anything but dense floating-point tensors (numbers and numpy arrays
            are not taken for such), or tasks whose gradients differ in structure.
    """
    if isinstance(gradients, Tensor):
        if gradients.ndim != 2 or not len(gradients):
            raise InputError(
                f"gradients: expected a (T, P) tensor with T >= 1, got {tuple(gradients.shape)}"
            )
        check_tensor(gradients, "gradients")
        return gradients
    if not _is_sequence(gradients):
        remedy = STACKED if isinstance(gradients, Mapping) else REMEDY
        raise InputError(
            "gradients: expected a (T, P) tensor, or T per-task gradients of tensors; got a "
            f"{type(gradients).__name__}; {remedy}"
        )
    tasks = [_parts(task, f"gradients: task {i}") for i, task in enumerate(gradients)]
    if not tasks:
        raise InputError("gradients: expected at least one task, got an empty sequence")
    shapes: dict[object, torch.Size] = {}
    like: Tensor | None = None
    for i, task in enumerate(tasks):
        if task.keys() != tasks[0].keys():
            odd = sorted(map(str, task.keys() ^ tasks[0].keys()))
            raise InputError(
                f"gradients: tasks 0 and {i} differ in their parts: {', '.join(odd[:4])}"
            )
        for key, part in task.items():
            if part is None:
                continue
            like = part if like is None else like
            if shapes.setdefault(key, part.shape) != part.shape:
                raise InputError(
                    f"gradients: part {key} is {tuple(part.shape)} in task {i}, "
                    f"{tuple(shapes[key])} before"
                )
    if like is None:
        raise InputError("gradients: every part of every task is None")
    rows = [
        torch.cat(
            [
                like.new_zeros(shapes[key].numel()) if part is None else part.reshape(-1)
                for key, part in task.items()
                if key in shapes
            ]
        )
        for task in tasks
    ]
    return as_rows(torch.stack(rows))


REMEDY = "numbers and arrays become tensors by torch.as_tensor(...)"
STACKED = (
    "a dict of stacked gradients, as torch.func.vmap(grad(...)) gives, becomes rows by "
    "torch.cat([g.flatten(1) for g in gradients.values()], 1)"
)


def _parts(task: TaskGradient, what: str) -> dict[object, Tensor | None]:
    parts: dict[object, Any]
    if isinstance(task, Mapping):
        parts = {key: task[key] for key in sorted(task, key=str)}
    elif isinstance(task, Tensor) or not _is_sequence(task):
        parts = {0: task}
    else:
        parts = dict(enumerate(task))
    for key, part in parts.items():
        if part is not None or part is task:
            check_tensor(part, what if part is task else f"{what}, part {key}")
    return parts


def _is_sequence(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | Mapping)


def check_tensor(value: object, what: str) -> None:
    """Raise an `InputError` unless ``value`` is a dense tensor of floating-point numbers."""
    if not isinstance(value, Tensor):
        raise InputError(f"{what}: expected a tensor, got a {type(value).__name__}; {REMEDY}")
    if not value.is_floating_point():
        raise InputError(f"{what}: expected floating-point numbers, got {value.dtype}")
    if value.layout != torch.strided:
        raise InputError(f"{what}: expected a dense tensor, got {value.layout}; use .to_dense()")


def largest_entries(rows: Tensor) -> Tensor:
    """The largest absolute entry of each row, ``(T,)``: NaN or inf where the row has one."""
    if not rows.shape[1]:
        return rows.new_zeros(len(rows))
    parts = torch.split(rows.detach(), max(1, 2**20 // max(1, len(rows))), dim=1)
    return torch.stack([part.abs().amax(1) for part in parts]).amax(0)


def check_finite(per_task: Tensor, what: str, first: int = 0) -> None:
    """Raise an `InputError` that names the first task whose value ``(T,)`` is not finite.

    Args:
        per_task: values of the tasks ``first``, ``first + 1`` and so on.
        what: what the values belong to.
        first: the number of the first one.
    """
    bad = (~torch.isfinite(per_task)).nonzero().flatten().tolist()
    if bad:
        others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(
            f"{what} of task {first + bad[0]}{others} is not finite ({float(per_task[bad[0]])}); "
            "lower the inner learning rate, or leave the task out"
        )


def check_gramian(gramian: Tensor) -> None:
    """Raise an `InputError` unless ``gramian`` is a finite ``(T, T)`` tensor; it names the task."""
    check_tensor(gramian, "gramian")
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        raise InputError(f"gramian: expected a (T, T) tensor, got {tuple(gramian.shape)}")
    gramian = gramian.detach()
    # A gradient that is not finite makes a whole row and column so; its own place is the diagonal.
    check_finite(gramian.diagonal(), "Gramian row")
    check_finite(gramian.abs().amax(1), "Gramian row")
