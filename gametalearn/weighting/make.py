"""Rules by name, as the command line and configuration files give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from gametalearn import registry
from gametalearn.errors import InputError
from gametalearn.weighting.options import check_options, options_of
from gametalearn.weighting.weights import Rule

__all__ = ["RULES", "make_rule", "rule_from", "rule_options"]

RULES: tuple[str, ...] = tuple(registry.BUILT_IN["rule"])
"""The names that are built in; `make_rule` knows those of installed packages and TorchJD's, too."""

SETTINGS = ("objectives", "within", "balance", "columns", "seed")
"""What `make_rule` offers to a rule, beside the rule's own options."""


def make_rule(
    name: str,
    *,
    objectives: int | Sequence[int] = 1,
    regression: bool = False,
    within: Literal["uniform", "agreement"] = "uniform",
    balance: Sequence[float] | None = None,
    columns: slice | Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Rule:
    """The weighting rule of a name.

    Args:
        name: one of `RULES`; ``torchjd:UPGrad`` and the like, TorchJD's weightings; the name of a rule
            that an installed package registered; or ``package.module:attribute``, a class or function
            that gives a rule (see `gametalearn.registry`).
        objectives: the objectives that tasks may belong to, for the rules that weight objectives:
            their number K, for groups 0 to K - 1, or their identities.
        regression: whether the score is an error and no accuracy; ``dtp`` refuses it.
        within: how such a rule combines the tasks of one objective.
        balance: of such a rule, the share of each objective at equal weights; None: equal shares.
        columns: of the rows, those of the shared weights W of ``gradnorm`` (see
            `gametalearn.shared_columns`); None takes all.
        seed: of the random numbers that some rules draw.
        options: keyword arguments of the rule's class (`rule_options`); each is checked.

    A rule has no use for some of the others, and leaves them aside.

    Raises:
        InputError: an unknown name or option, a value that an option cannot take, or a rule that
            the setting does not allow.

    >>> make_rule("agreement-cosine").normalize
    True
    """
    if name == "dtp" and regression:
        raise InputError(
            "rule 'dtp' weighs objectives by their accuracy, and regression has none; "
            "use gradnorm, uncertainty, uncertainty-positive or dwa"
        )
    part, fixed = registry.resolve("rule", name)
    offered = {
        "objectives": objectives, "within": within, "balance": balance, "columns": columns,
        "seed": seed,
    }  # fmt: skip
    return rule_from(name, part, offered, {**fixed}, options)


def rule_from(
    name: str,
    part: Callable[..., Rule],
    offered: dict[str, Any],
    fixed: dict[str, Any],
    options: dict[str, Any],
) -> Rule:
    """A rule out of its class or function, and options that are checked first; see `make_rule`."""
    if not name.startswith(registry.TORCHJD):  # which checks its own
        check_options(name, part, options, {*fixed, *SETTINGS})
    try:
        rule: Rule = registry.call("rule", name, part, offered, {**fixed, **options})
    except InputError as error:  # in the user's terms, not the class's
        said = str(error).removeprefix(f"{getattr(part, '__name__', name)}: ")
        if said.startswith("rule '"):
            raise
        raise InputError(f"rule '{name}': {said}") from error
    if not callable(rule):
        raise InputError(
            f"rule '{name}' makes a {type(rule).__name__}; name a class or a function that makes a rule"
        )
    return rule


def rule_options(name: str) -> dict[str, Any]:
    """The options that `make_rule` takes for a name, and their defaults.

    >>> rule_options("dwa")
    {'temperature': 2.0, 'period': 50}
    """
    part, fixed = registry.resolve("rule", name)
    return options_of(part, {*fixed, *SETTINGS})
