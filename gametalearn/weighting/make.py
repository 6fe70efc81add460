"""Rules by name, as the command line and configuration files give them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.weighting.agreement import GradientAgreement
from gametalearn.weighting.dtp import DynamicTaskPrioritization
from gametalearn.weighting.dwa import DynamicWeightAverage
from gametalearn.weighting.gradnorm import GradNorm
from gametalearn.weighting.options import check_options, options_of
from gametalearn.weighting.uncertainty import UncertaintyWeighting
from gametalearn.weighting.uniform import NormControl, Uniform
from gametalearn.weighting.weights import Rule

__all__ = ["RULES", "make_rule", "rule_options"]

TASK_RULES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "uniform": (Uniform, {}),
    "agreement": (GradientAgreement, {}),
    "agreement-update": (GradientAgreement, {"signal": "update"}),
    "agreement-cosine": (GradientAgreement, {"normalize": True}),
    "norm-control": (NormControl, {}),
}
"""Rules over tasks: class, and the options that the name stands for."""

OBJECTIVE_RULES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
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
    seed: int = 0,
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
        seed: of the random numbers that some of TorchJD's rules draw.
        options: keyword arguments of the rule's class (`rule_options`); each is checked.

    A rule has no use for some of the others, and leaves them aside.

    Raises:
        InputError: an unknown name or option, a value that an option cannot take, or a rule that
            the setting does not allow.

    >>> make_rule("agreement-cosine").normalize
    True
    """
    if name.startswith("torchjd:"):
        return _torchjd_rule(name, seed, options)
    if name == "dtp" and regression:
        raise InputError(
            "rule 'dtp' weighs objectives by their accuracy, and regression has none; "
            "use gradnorm, uncertainty, uncertainty-positive or dwa"
        )
    cls, fixed = _class_of(name)
    settings = {"objectives": objectives, "within": within, "columns": columns}
    fixed = {**fixed, **{k: settings[k] for k in _settings_of(name)}}
    check_options(name, cls, options, fixed)
    rule: Rule = cls(**fixed, **options)
    return rule


def rule_options(name: str) -> dict[str, Any]:
    """The options that `make_rule` takes for a name of `RULES`, and their defaults.

    >>> rule_options("dwa")
    {'temperature': 2.0, 'period': 50}
    """
    cls, fixed = _class_of(name)
    return options_of(cls, {*fixed, *_settings_of(name)})


def _settings_of(name: str) -> tuple[str, ...]:
    """Which of `make_rule`'s own arguments a rule takes."""
    if name not in OBJECTIVE_RULES:
        return ()
    return ("objectives", "within", "columns") if name == "gradnorm" else ("objectives", "within")


def _class_of(name: str) -> tuple[type[nn.Module], dict[str, Any]]:
    rules = {**TASK_RULES, **OBJECTIVE_RULES}
    if name in rules:
        return rules[name]
    near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise InputError(f"unknown rule '{name}'; {hint}known: {', '.join(RULES)}, torchjd:NAME")


def _torchjd_rule(name: str, seed: int, options: dict[str, Any]) -> Rule:
    try:
        bridge = importlib.import_module("gametalearn.bridges.torchjd")
    except ModuleNotFoundError as error:
        raise InputError(
            f"rule '{name}': {error.name} is not installed; pip install 'gametalearn[torchjd]'"
        ) from error
    rule: Rule = bridge.TorchJDRule(name.removeprefix("torchjd:"), seed=seed, **options)
    return rule
