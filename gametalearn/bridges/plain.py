"""Weighting rules in a loop of your own: three lines around ``loss.backward()``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.weighting.agreement import GradientAgreement
from gametalearn.weighting.weights import Rule, Weights, as_weights, require_rule

__all__ = ["GradientCollector", "WeightsFunction", "as_rule", "flatten", "weigh", "write_gradient"]

WeightsFunction = Callable[[Tensor], Tensor]
"""From rows ``(T, P)`` to weights ``(T,)``, such as `gametalearn.agreement_weights`."""


class GradientCollector:
    """Collects ``.grad`` task by task and writes the weighted combination back into ``.grad``.

    ``combine`` leaves sum_i w_i g_i, g_i the gradient that task i's ``backward`` left and w_i its
    effective weight. It is scaled like the *mean* over tasks, not like the sum that repeated
    ``backward`` calls build up: uniform weights give the mean, and agreement has sum |w_i| = 1. So
    a loop's own division by the number of tasks goes, and learning rates and clipping stay.

    Anything may follow that works on ``.grad``: any optimiser, clipping, AMP's `GradScaler`. A
    parameter that no task gave a gradient keeps None; one that some gave counts as zero in the
    others. Those that do not require gradients, of whatever dtype, have no part in the rows and
    keep their ``.grad``. Memory: T gradients, and up to three times as much again while they are
    combined, as was measured for 6 tasks of 80 MB (`stream_agreement` needs a fixed number).

    Every ``.grad`` is None or zero when the first task's ``backward`` runs: call ``optimizer.zero_grad()``
    after each step. To accumulate, add the tasks of several meta-batches before one ``combine``.

    Args:
        parameters: those of the optimiser: ``model.parameters()`` or ``optimizer.param_groups``.
            Those that require gradients are on one device; of several dtypes, the rows take the
            widest. Fixed from here on, but for which of them require gradients: that may change
            from one meta-batch to the next. A layer that takes another's place later has other
            parameters, so make a new collector then, as you make a new optimiser.
        rule: any `Rule` of `gametalearn.weighting` (a module from `TaskGradients` to `Weights`), or
            a plain function from rows ``(T, P)`` to weights ``(T,)``, such as `agreement_weights`.
            A rule's own state is advanced and saved as anywhere else. Default: gradient agreement.

    Raises:
        InputError: no parameters, or none that requires gradients; something that is no tensor, or
            requires gradients and is no leaf of real floating point; several devices; a rule by its
            name or as a class.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> collect = GradientCollector(model.parameters())
    >>> for x in torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]):
    ...     model(x).sum().backward()
    ...     collect.add()
    >>> collect.combine().effective
    tensor([ 0.2500,  0.5000, -0.2500])
    >>> model.weight.grad
    tensor([[1.0000, 0.5000]])
    >>> optimizer.step()
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        rule: Rule | WeightsFunction | None = None,
    ) -> None:
        if isinstance(parameters, (nn.Module, Tensor)) or not isinstance(parameters, Iterable):
            raise InputError(
                "GradientCollector: parameters must be an iterable of parameters, got a "
                f"{type(parameters).__name__}; pass model.parameters()"
            )
        listed: list[Any] = list(parameters)
        if all(isinstance(group, Mapping) and "params" in group for group in listed):
            listed = [p for group in listed for p in group["params"]]
        if not listed:
            raise InputError("GradientCollector: parameters is empty; pass model.parameters()")
        self._all: list[Tensor] = list(dict.fromkeys(map(_tensor, listed)))
        self._parameters = _trained(self._all)
        if not self._parameters:
            raise InputError(
                "GradientCollector: no parameter requires gradients; call requires_grad_() on those "
                "to be trained"
            )
        self.rule = as_rule(rule, "GradientCollector")
        self._tasks: list[_Task] = []
        self._left = _Left()

    def __len__(self) -> int:
        """Tasks collected since the last `combine`."""
        return len(self._tasks)

    def add(
        self,
        *,
        loss: Tensor | float | None = None,
        score: Tensor | float | None = None,
        group: int | None = None,
        update: Iterable[Tensor | None] | None = None,
    ) -> None:
        """Take the gradients that the task's ``backward`` left; each ``.grad`` becomes None.

        Agreement and the other rules over gradients need no argument. A rule that lacks one says
        so when it is asked for weights.

        Args:
            loss: the task's loss, before AMP's scaling; for rules over losses. Kept in the rows'
                dtype, or in float32 if that is wider, as the score is.
            score: its accuracy in [0, 1]; for DTP's indicator ``"accuracy"``.
            group: its objective; for rules over objectives, where it may be left out only if there is
                one. Default: 0.
            update: the inner loop's theta - theta_i, one tensor per parameter in the order of
                ``parameters``, or one for each that requires gradients (None: zeros); for
                ``GradientAgreement(signal="update")``.

        Raises:
            InputError: no parameter has a gradient; ``.grad`` held the last combination when the task's
                ``backward`` ran; a sparse gradient; an update that does not fit the parameters; a loss
                or score that is no scalar, or a group that is no integer; parameters that require
                gradients here and did not for the task before, or the other way round.
        """
        trained = _trained(self._all)
        if self._tasks and list(map(id, trained)) != list(map(id, self._parameters)):
            raise InputError(
                f"GradientCollector: {len(trained)} parameters require gradients in task "
                f"{len(self._tasks)}, in those before {len(self._parameters)} that are not the same; "
                "freeze and unfreeze after combine()"
            )
        self._parameters = trained
        changes = None if update is None else _listed(update)
        if changes is not None and len(changes) == len(self._all):
            changes = [u for u, p in zip(changes, self._all, strict=True) if p.requires_grad]
        gradient = [p.grad for p in trained]
        self._left.refuse()
        if all(g is None for g in gradient):
            raise InputError(
                "GradientCollector: add() found no gradient on any parameter; call it right after "
                "the task's loss.backward()"
            )
        task = _Task(
            row=flatten(self._parameters, gradient, "gradient"),
            present=[g is not None for g in gradient],
            update=None if changes is None else flatten(self._parameters, changes, "update"),
            loss=_scalar("loss", loss),
            score=_scalar("score", score),
            group=None if group is None else _integer(group),
        )
        for parameter, present in zip(self._parameters, task.present, strict=True):
            if present:
                parameter.grad = None
        self._tasks.append(task)

    def combine(self) -> Weights:
        """Weigh the tasks, write sum_i w_i g_i into ``.grad`` and start afresh.

        If a gradient is inf or NaN, the rule is not asked and its state does not advance: ``.grad``
        becomes the plain mean, inf and NaN included, so that AMP's scaler skips the step, and the
        weights returned are uniform. A common scale, AMP's too, leaves agreement's weights as they
        are; a rule that depends on it (GradNorm) sees the scaled gradients.

        Returns:
            The `Weights` of the tasks, in the order in which they were added.

        Raises:
            InputError: no task was added, the rule needs what `add` was not given (one over several
                objectives the ``group``), or gives a weight that is not finite. The tasks are dropped
                then, too.
        """
        tasks, self._tasks = self._tasks, []
        if not tasks:
            raise InputError(
                "GradientCollector: combine() found no task; call add() after each task's "
                "loss.backward()"
            )
        if any(task.group is None for task in tasks) and _over_several(self.rule):
            _lacks("group")
        gradients = _CollectedGradients(tasks)
        rows = gradients.rows
        if bool(torch.isfinite(rows).all()):
            weights = weigh(self.rule, gradients)
        else:
            uniform = rows.new_full((len(rows),), 1 / len(rows))
            weights = Weights(raw=uniform, effective=uniform)
        present = [any(flags) for flags in zip(*(task.present for task in tasks), strict=True)]
        write_gradient(self._parameters, present, weights, rows)
        given = zip(self._parameters, present, strict=True)
        self._left.watch(next((p for p, there in given if there and p.requires_grad), None))
        return weights


class _Left:
    """Whether the combination was still in ``.grad`` when the next task's gradient was added to it.

    It would count as a part of that task's. Afterwards it cannot be told, since ``zero_grad`` may clear
    a gradient in place, so one parameter is looked at whenever a ``backward`` reaches it, and when the task
    is added. Once it was cleared, all is well, whatever other losses were differentiated before.
    """

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._written: Tensor | None = None
        self._found: Tensor | None = None
        self._edge: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(_Left())  # a node cannot be copied

    def watch(self, parameter: Tensor | None) -> None:
        """Look at a parameter whose ``.grad`` was just written; None: at none."""
        self._stop()
        if parameter is None:
            return
        self._parameter, self._written = parameter, parameter.grad
        # no synchronisation yet
        self._found = None if parameter.grad is None else parameter.grad.any()
        # Its node is what adds to .grad; it lives as long as somebody holds it.
        with torch.inference_mode(False):
            node = torch.autograd.graph.get_gradient_edge(parameter).node
        self._edge = node, node.register_prehook(lambda _: self._look())

    def refuse(self) -> None:
        """Raise the `InputError` if it was there, and look on: it is there until it is cleared."""
        self._look()
        found, parameter = self._found, self._parameter
        self._stop()
        if found is not None and bool(found):
            self.watch(parameter)
            raise InputError(
                "GradientCollector: .grad still held the last combination when this task's backward ran; "
                "call optimizer.zero_grad() after each step, and to accumulate several meta-batches add "
                "all their tasks before one combine()"
            )

    def _look(self) -> None:
        if self._found is None or self._parameter is None or self._written is None:
            return
        there = self._parameter.grad is self._written
        self._found = self._found & self._written.any() if there else None

    def _stop(self) -> None:
        if self._edge is not None:
            self._edge[1].remove()
        self._parameter = self._written = self._found = self._edge = None


@dataclass
class _Task:
    row: Tensor
    present: list[bool]
    update: Tensor | None
    loss: Tensor | None
    score: Tensor | None
    group: int | None


class _CollectedGradients(TaskGradients):
    """`TaskGradients` of a loop that need not know them all; a missing field says how to give it."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        rows = torch.stack([task.row for task in tasks])
        group = torch.tensor([task.group or 0 for task in tasks], device=rows.device)
        fields = {"rows": rows, "group": group}
        wide = torch.promote_types(rows.dtype, torch.float32)  # a loss of 1e5 is inf in float16
        for field, dtype, values in (
            ("updates", rows.dtype, [task.update for task in tasks]),
            ("loss", wide, [task.loss for task in tasks]),
            ("score", wide, [task.score for task in tasks]),
        ):
            given = [value.to(rows.device, dtype) for value in values if value is not None]
            if len(given) == len(tasks):
                fields[field] = torch.stack(given)
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> NoReturn:
        # Python comes here for what is not set only.
        if name in ("updates", "loss", "score"):
            _lacks("update" if name == "updates" else name)
        raise AttributeError(
            f"a rule that is a module is given TaskGradients, which have no '{name}'; use .rows, or pass a "
            "plain function of rows (T, P) instead"
        )


def _lacks(argument: str) -> NoReturn:
    raise InputError(
        f"GradientCollector: this rule needs the {argument} of every task; pass it as add({argument}=...)"
    )


def _over_several(rule: object) -> bool:
    """Whether a rule weighs several objectives."""
    objectives = getattr(rule, "objectives", None)
    return isinstance(objectives, Sized) and len(objectives) > 1


def as_rule(rule: Rule | WeightsFunction | None, where: str) -> Rule | WeightsFunction:
    """The rule that is meant: gradient agreement for None.

    Raises:
        InputError: it cannot be asked for weights: a name, a class, anything that cannot be called.
    """
    given = GradientAgreement() if rule is None else rule
    kinds = "a rule, or a function from rows (T, P) to weights (T,)"
    require_rule(given, f"{where}: `rule`", kinds)
    return given


def weigh(rule: Rule | WeightsFunction, gradients: TaskGradients) -> Weights:
    """The weights of T tasks by a rule, or by a function of their rows.

    Raises:
        InputError: ``rule`` does not give finite ``(T,)`` weights, or raises one itself.
    """
    rows = gradients.rows
    result = rule(gradients if isinstance(rule, nn.Module) else rows)  # type: ignore[arg-type]
    name = getattr(rule, "__name__", type(rule).__name__)
    weights = as_weights(result, gradients, name)
    effective = weights.effective
    bad = (~torch.isfinite(effective)).nonzero().flatten().tolist()
    if bad:
        others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(
            f"rule {name}: the weight of task {bad[0]}{others} is not finite "
            f"({float(effective[bad[0]])}), though all gradients are; where the rule divides by zero, "
            "let it return 1/T"
        )
    return weights


def flatten(parameters: Sequence[Tensor], parts: Sequence[Tensor | None], what: str) -> Tensor:
    """One ``(P,)`` copy of a tensor for each parameter, zeros for None; the widest dtype of all.

    Raises:
        InputError: a part that is sparse or does not fit its parameter; ``what`` names it.
    """
    if len(parts) != len(parameters):
        raise InputError(
            f"GradientCollector: {what} has {len(parts)} tensors for {len(parameters)} parameters"
        )
    for i, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
        if part is not None and (part.layout != torch.strided or part.shape != parameter.shape):
            raise InputError(
                f"GradientCollector: {what} {i} is {part.layout} {tuple(part.shape)}; expected a "
                f"dense tensor {tuple(parameter.shape)}"
                + ("; make the embedding with sparse=False" if part.is_sparse else "")
            )
    return torch.cat(
        [
            (torch.zeros_like(p) if part is None else part).detach().reshape(-1)
            for p, part in zip(parameters, parts, strict=True)
        ]
    )


def write_gradient(
    parameters: Sequence[Tensor], present: Sequence[bool], weights: Weights, rows: Tensor
) -> None:
    """Set ``.grad`` to sum_i w_i rows_i, each parameter in its own dtype and memory format.

    Args:
        parameters: P elements in all.
        present: whether a parameter gets a gradient; ``.grad`` is left as it is otherwise.
        weights: effective weights ``(T,)``.
        rows: ``(T, P)``; half precision is summed in float32.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    combined = weights.effective.detach().to(rows.device, wide) @ rows.to(wide)
    parts = torch.split(combined, [p.numel() for p in parameters])
    for parameter, wanted, part in zip(parameters, present, parts, strict=True):
        if wanted:
            parameter.grad = torch.empty_like(parameter, requires_grad=False)
            parameter.grad.copy_(part.view_as(parameter))


def _tensor(parameter: object) -> Tensor:
    if not isinstance(parameter, Tensor):
        raise InputError(
            f"GradientCollector: parameters must be tensors, got a {type(parameter).__name__}; "
            "pass model.parameters()"
        )
    return parameter


def _trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Those that require gradients, which can be rows."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if not parameter.is_leaf or not parameter.is_floating_point():
            raise InputError(
                "GradientCollector: parameters must be leaf tensors of real floating point, got "
                f"{parameter.dtype}{'' if parameter.is_leaf else ' computed from others'}"
            )
        if parameter.device != trained[0].device:
            raise InputError(
                f"GradientCollector: parameters must be on one device, got {trained[0].device} and "
                f"{parameter.device}"
            )
    return trained


def _listed(update: Any) -> list[Tensor | None]:
    """An update as a list.

    Raises:
        InputError: it is something else than tensors, one after another.
    """
    remedy = "it must be a list with one tensor or None per parameter"
    if isinstance(update, Mapping | Tensor | str) or not isinstance(update, Iterable):
        raise InputError(f"GradientCollector: update is a {type(update).__name__}; {remedy}")
    found = list(update)
    for i, part in enumerate(found):
        if part is not None and not isinstance(part, Tensor):
            raise InputError(f"GradientCollector: update {i} is a {type(part).__name__}; {remedy}")
    return found


def _scalar(name: str, value: Tensor | float | None) -> Tensor | None:
    if value is None:
        return None
    try:
        scalar = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"GradientCollector: {name} must be a number, got a {type(value).__name__}"
        ) from error
    if scalar.numel() != 1:
        raise InputError(
            f"GradientCollector: {name} must be one number per task, got {tuple(scalar.shape)}"
        )
    return scalar.reshape(())


def _integer(group: int) -> int:
    try:
        return operator.index(group)
    except TypeError as error:
        raise InputError(
            f"GradientCollector: group must be the number of the task's objective, got {group!r}"
        ) from error
