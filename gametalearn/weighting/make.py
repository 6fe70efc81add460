"""Rules by name, as the command line and configuration files give them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from gametalearn.errors import InputError
from gametalearn.weighting.agreement import GradientAgreement
from gametalearn.weighting.dtp import DynamicTaskPrioritization
from gametalearn.weighting.dwa import DynamicWeightAverage
from gametalearn.weighting.gradnorm import GradNorm
from gametalearn.weighting.uncertainty import UncertaintyWeighting
from gametalearn.weighting.uniform import NormControl, Uniform
from gametalearn.weighting.weights import Rule

__all__ = ["RULES", "make_rule"]

TASK_RULES: dict[str, tuple[Callable[..., Rule], dict[str, Any]]] = {
    "uniform": (Uniform, {}),
    "agreement": (GradientAgreement, {}),
    "agreement-update": (GradientAgreement, {"signal": "update"}),
    "agreement-cosine": (GradientAgreement, {"normalize": True}),
    "norm-control": (NormControl, {}),
}
"""Rules over tasks: class, and the options that the name stands for."""

OBJECTIVE_RULES: dict[str, tuple[Callable[..., Rule], dict[str, Any]]] = {
    "gradnorm": (GradNorm, {}),
    "uncertainty": (UncertaintyWeighting, {}),
    "uncertainty-positive": (UncertaintyWeighting, {"form": "positive"}),
    "dwa": (DynamicWeightAverage, {}),
    "dtp": (DynamicTaskPrioritization, {}),
}
"""Rules over objectives."""

RULES: tuple[str, ...] = (*TASK_RULES, *OBJECTIVE_RULES)
"""The names that `make_rule` knows, beside ``torchjd:NAME``."""


def make_rule(
    name: str,
    *,
    objectives: int | Sequence[int] = 1,
    regression: bool = False,
    within: Literal["uniform", "agreement"] = "uniform",
    columns: slice | Tensor | None = None,
    **options: Any,
) -> Rule:
    """The weighting rule of a name: one of `RULES`, or ``torchjd:NAME``.

    Args:
        name: a name of `RULES`; ``torchjd:UPGrad`` and the like are TorchJD's Gramian weightings.
        objectives: the objectives that tasks may belong to, for the rules that weight objectives:
            their number K, for groups 0 to K - 1, or their identities.
        regression: whether the score is an error and no accuracy; ``dtp`` refuses it.
        within: how such a rule combines the tasks of one objective.
        columns: of the rows, those of the shared weights W of ``gradnorm`` (see
            `gametalearn.shared_columns`); None takes all.
        options: keyword arguments of the rule's class.

    Rules over tasks have no use for the first four and leave them aside.

    Raises:
        InputError: an unknown name or option, or a rule that the setting does not allow.

    >>> make_rule("agreement-cosine").normalize
    True
    """
    if name.startswith("torchjd:"):
        return _torchjd_rule(name, options)
    if name in TASK_RULES:
        cls, fixed = TASK_RULES[name]
        return cls(**_checked(name, cls, fixed, options))
    if name in OBJECTIVE_RULES:
        if name == "dtp" and regression:
            raise InputError(
                "rule 'dtp' weighs objectives by their accuracy, and regression has none; "
                "use gradnorm, uncertainty, uncertainty-positive or dwa"
            )
        cls, fixed = OBJECTIVE_RULES[name]
        fixed = {**fixed, "objectives": objectives, "within": within}
        if cls is GradNorm:
            fixed["columns"] = columns
        return cls(**_checked(name, cls, fixed, options))
    near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise InputError(f"unknown rule '{name}'; {hint}known: {', '.join(RULES)}, torchjd:NAME")


def _checked(
    name: str, cls: Callable[..., object], fixed: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """All keyword arguments of a rule, after a check that it takes ``options``."""
    parameters = inspect.signature(cls).parameters.values()
    # A class without a constructor of its own shows nn.Module's *args and **kwargs.
    takes = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes -= fixed.keys()
    for option in options:
        if option not in takes:
            known = f"it takes {', '.join(sorted(takes))}" if takes else "it takes none"
            raise InputError(f"rule '{name}': no option '{option}'; {known}")
    return {**fixed, **options}


def _torchjd_rule(name: str, options: dict[str, Any]) -> Rule:
    try:
        bridge = importlib.import_module("gametalearn.bridges.torchjd")
    except ModuleNotFoundError as error:
        raise InputError(
            f"rule '{name}': {error.name} is not installed; pip install 'gametalearn[torchjd]'"
        ) from error
    rule: Rule = bridge.TorchJDRule(name.removeprefix("torchjd:"), **options)
    return rule
