"""A probe's measurements and their statistics: means with intervals, paired by meta-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gametalearn.errors import InputError
from gametalearn.statistics import Estimate, holm, over_seeds

__all__ = ["STEPS", "TASKS", "Probe"]

Array = np.ndarray[Any, np.dtype[np.float64]]

STEPS = {
    "length": "all updates at one length",
    "plain": "updates as they are, at one rate",
    "optimizer": "updates through the optimiser",
}
"""The steps by name; a probe without an optimiser has only the first two."""

TASKS = ("same", "fresh", "clean")
"""What gains are measured on: tasks of the meta-batch itself, fresh ones, uncorrupted ones."""


@dataclass(frozen=True)
class Probe:
    """What `gametalearn.probe` measured for R rules on B meta-batches of T tasks each.

    Attributes:
        rules: their names.
        tasks: T.
        before: by tasks (``same``, ``fresh`` and, if tasks are corrupted, ``clean``), ``(B,)``: the
            mean query loss after adaptation from the unchanged weights.
        gains: by step (`STEPS`) and tasks, ``(R, B)``: how much the step lowers that loss.
        cosine_uniform: ``(R, B)``, between a rule's update and the mean of the same gradients.
        cosine_true: ``(R, B)``, between it and the mean gradient of ``reference`` other tasks.
        effective_tasks: ``(R, B)``, (sum |e|)^2 / sum e^2 of the effective weights e, up to T.
        size: ``(R, B)``, the lengths of the updates as they are.
        length: the length of the steps at one length.
        rate: the rate for the updates as they are, at which uniform's have ``length`` on
            average over the reference tasks, which are not corrupted.
        reference: the number of tasks that estimate the true direction: clean ones, if there are any.
        seed: the seed of all tasks.
    """

    rules: tuple[str, ...]
    tasks: int
    before: dict[str, Array]
    gains: dict[str, dict[str, Array]]
    cosine_uniform: Array
    cosine_true: Array
    effective_tasks: Array
    size: Array
    length: float
    rate: float
    reference: int
    seed: int

    @property
    def baseline(self) -> str:
        """The rule that the others are compared with: ``uniform``, or the first."""
        return "uniform" if "uniform" in self.rules else self.rules[0]

    @property
    def aim(self) -> str:
        """The tasks that rules are judged by: ``clean`` if tasks are corrupted, else ``fresh``."""
        return "clean" if "clean" in self.before else "fresh"

    def gain(self, rule: str, step: str = "length", tasks: str = "fresh") -> Estimate:
        """A rule's mean gain over meta-batches, with its t interval (None below 3 meta-batches)."""
        return over_seeds(self._of(rule, step, tasks))

    def difference(self, rule: str, step: str = "length", tasks: str = "fresh") -> Estimate:
        """Its mean gain minus the baseline's, paired by meta-batch, with its interval and p-value."""
        return over_seeds(self._of(rule, step, tasks) - self._of(self.baseline, step, tasks))

    def _of(self, rule: str, step: str, tasks: str) -> Array:
        """The gains ``(B,)``; `InputError` for a name that is not there."""
        for what, name, known in (
            ("rule", rule, self.rules), ("step", step, tuple(self.gains)), ("tasks", tasks, tuple(self.before)),
        ):  # fmt: skip
            if name not in known:
                raise InputError(f"this probe has no {what} '{name}'; it has {', '.join(known)}")
        gains: Array = self.gains[step][tasks][self.rules.index(rule)]
        return gains

    def p_holm(self, step: str = "length", tasks: str = "fresh") -> dict[str, float | None]:
        """The p-values of `difference`, adjusted for the number of rules (Holm 1979)."""
        others = [rule for rule in self.rules if rule != self.baseline]
        found = holm([self.difference(rule, step, tasks).p_value for rule in others])
        return dict(zip(others, found, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without NaN, including every meta-batch's gains."""
        return {
            "tasks": self.tasks,
            "meta_batches": len(self.before["same"]),
            "reference": self.reference,
            "length": self.length,
            "rate": self.rate,
            "seed": self.seed,
            "baseline": self.baseline,
            "aim": self.aim,
            "before": {tasks: _summary(over_seeds(v)) for tasks, v in self.before.items()},
            "rules": {rule: self._of_rule(rule) for rule in self.rules},
        }

    def _of_rule(self, rule: str) -> dict[str, Any]:
        row = self.rules.index(rule)
        measured = ("cosine_uniform", "cosine_true", "effective_tasks", "size")
        found: dict[str, Any] = {
            name: _summary(over_seeds(getattr(self, name)[row])) for name in measured
        }
        found["gains"] = {
            step: {
                tasks: {
                    **_summary(self.gain(rule, step, tasks)),
                    "minus_baseline": self._paired(rule, step, tasks),
                    "by_meta_batch": values[row].tolist(),
                }
                for tasks, values in by_tasks.items()
            }
            for step, by_tasks in self.gains.items()
        }
        return found

    def _paired(self, rule: str, step: str, tasks: str) -> dict[str, Any] | None:
        if rule == self.baseline:
            return None
        estimate = self.difference(rule, step, tasks)
        p_holm = self.p_holm(step, tasks)[rule]
        return {**_summary(estimate), "p_value": estimate.p_value, "p_holm": p_holm}


def _summary(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "ci95": estimate.ci95}
