"""What a reader of a comparison should keep in mind, derived from its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gametalearn.errors import InputError
from gametalearn.logs import Record, Records, records_of
from gametalearn.statistics import FEWEST
from gametalearn.stored import earlier_looks, other_looks
from gametalearn.tables import HALF_A_POINT, TWENTIETH, verdict_of
from gametalearn.units import Units

__all__ = ["at_once", "cautions"]

USUAL = 5
"""Seeds that `compare` trains by default; fewer are called few."""

AFTER_A_LOOK = 8.6
"""Percent of comparisons without an effect that show one at 5%, if 3 seeds are looked at and 2 more
are added unless those already show it (a simulation of normal differences)."""


def cautions(
    results: dict[str, Any],
    records: Records | None = None,
    looks: Sequence[int] = (),
    others: Sequence[str] = (),
) -> list[str]:
    """Sentences, the most important first.

    Args:
        results: the content of ``results.json``.
        records: what the runs logged, if available.
        looks: the number of seeds at each earlier look, before these were complete
            (`gametalearn.stored.earlier_looks`).
        others: what `gametalearn.stored.other_looks` tells.
    """
    return [
        *_few_seeds(results),
        *_looks(results, looks),
        *others,
        *_not_converged(results),
        *(_of_runs(records) if records else []),
        *(_idle(records) if records else []),
        *_wide(results),
        *_equal(results),
        *_controls(results),
        *_reach(results),
        *_origin(results),
    ]


def at_once(folder: Path, results: dict[str, Any]) -> list[str]:
    """What the terminal says below the table: what was chosen after earlier results in this folder had been
    seen, and the rules that did nothing; sentences."""
    try:
        idle = _idle(records_of(folder, results))
    except InputError:  # the plots, which need the runs' metrics too, say so
        idle = []
    return [*_looks(results, earlier_looks(folder, results)), *other_looks(folder, results), *idle]


def _few_seeds(results: dict[str, Any]) -> list[str]:
    seeds = _count(results)
    if seeds < FEWEST:
        return [
            f"{seeds} seed{'s are' if seeds > 1 else ' is'} too few for an interval over seeds: how "
            "the rules compare on other seeds is open."
        ]
    if seeds < USUAL:
        return [
            f"{seeds} seeds are few: the width of an interval is itself uncertain, and occasional failed "
            "runs may not be among them."
        ]
    return []


def _looks(results: dict[str, Any], looks: Sequence[int]) -> list[str]:
    if not looks:
        return []
    before = " and then ".join(str(n) for n in looks)
    return [
        f"Results of {before} seeds were written before there were {_count(results)}. If seeds were "
        "added because of what those showed, a difference is shown by chance more often than "
        f"p_holm says: with 2 seeds added to 3, in {AFTER_A_LOOK}% of comparisons instead of 5%."
    ]


def _not_converged(results: dict[str, Any]) -> list[str]:
    last, found = results["iterations"], {}
    for rule, entry in results["rules"].items():
        count = sum(one.get("best_iteration") == last for one in entry["seeds"])
        if count:
            found[rule] = f"{rule} on {count} of {len(entry['seeds'])}"
    if not found:
        return []
    return [
        f"Not converged: the best validation was the last one, at iteration {last}, for "
        f"{', '.join(found.values())} seed{'s' * (_count(results) > 1)}. Longer training may change the order."
    ]


def _of_runs(records: Records) -> list[str]:
    """Tasks that were left out, and validations that diverged."""
    found = []
    skipped = {rule: sum(run[-1].skipped for run in runs) for rule, runs in records.items()}
    if told := [f"{rule} {count}" for rule, count in skipped.items() if count]:
        found.append(f"Training tasks left out because they were not finite: {', '.join(told)}.")
    diverged = {
        rule: sum(r.validation is not None and bool(np.isnan(r.validation)) for run in runs for r in run)
        for rule, runs in records.items()
    }  # fmt: skip
    if told := [f"{rule} {count}" for rule, count in diverged.items() if count]:
        found.append(f"Validations that were not finite and were skipped: {', '.join(told)}.")
    return found


def _idle(records: Records) -> list[str]:
    """Rules that never weighted tasks otherwise than the plain mean."""
    plain = records.get("uniform", [])
    idle = [
        rule
        for rule, runs in records.items()
        if rule != "uniform" and plain and all(map(_same_weights, runs, plain))
    ]
    if not idle:
        return []
    dwa = " dwa begins after two of its periods (dwa.period)." if "dwa" in idle else ""
    return [
        f"In all that was logged, {', '.join(idle)} weighted the tasks as uniform does: this comparison "
        f"says nothing about {'it' if len(idle) == 1 else 'them'}.{dwa}"
    ]


def _same_weights(run: list[Record], plain: list[Record]) -> bool:
    return len(run) == len(plain) and all(
        one.effective.shape == other.effective.shape
        and np.allclose(one.effective, other.effective, rtol=1e-6, atol=0)
        for one, other in zip(run, plain, strict=True)
    )


def _wide(results: dict[str, Any]) -> list[str]:
    """How large a difference there may still be where none was shown."""
    units = Units.of(results)
    wide = []
    for pair in results["paired"]:
        if pair["ci95"] is None or verdict_of(results, pair) != "no difference shown":
            continue
        low, high = pair["ci95"]
        mean = abs(float(results["rules"][pair["baseline"]][units.name]))
        if high - low > 2 * (HALF_A_POINT if units.percent else TWENTIETH * mean):
            wide.append(f"{pair['rule']} from {units.show(low, '+')} to {units.size(high, '+')}")
    if not wide:
        return []
    return [f"No difference shown does not mean no difference. Wide intervals: {', '.join(wide)}."]


def _equal(results: dict[str, Any]) -> list[str]:
    return [
        f"{pair['rule']} differs from {pair['baseline']} by the same amount on every seed, which is "
        "hardly a coincidence: check that the seeds were different."
        for pair in results["paired"]
        if pair["ci95"] is not None and pair["p_value"] is None
    ]


def _controls(results: dict[str, Any]) -> list[str]:
    rules = results["rules"]
    family = [rule for rule in rules if rule.startswith("agreement")]
    if not family or "norm-control" in rules:
        return []
    return [
        f"{', '.join(family)} change{'s' * (len(family) == 1)} the length of the updates as well as their "
        "direction. Without norm-control among the rules the comparison cannot say which of the two mattered."
    ]


def _reach(results: dict[str, Any]) -> list[str]:
    """What the intervals do not cover."""
    found = []
    if results["ways"] is not None:
        found.append(
            "All seeds share one split into training, validation and test classes: these numbers do not "
            "say how much other classes would change."
        )
    if results["protocol"] == "transductive":
        found.append(
            "The protocol is transductive: the queries of a task are normalised together, which helps. "
            "Compare these numbers only with other transductive ones."
        )
    if len(results["paired"]) > 1 and _count(results) >= FEWEST:
        found.append(
            f"Each of the {len(results['paired'])} intervals holds on its own; the chance that at least one "
            "misses is larger than 5%. p_holm takes their number into account."
        )
    if primary := results.get("primary"):
        found.append(
            f"{', '.join(primary)} {'was' if len(primary) == 1 else 'were'} named as primary. That "
            "counts only if it was decided before any result was seen."
        )
    return found


def _origin(results: dict[str, Any]) -> list[str]:
    environment = results["environment"]
    if not environment:
        return ["Written by an older version, which did not record the runs' environment."]
    if str(environment.get("gametalearn", "")).endswith("changed)"):
        return ["The package's files had been changed since the commit named below."]
    return []


def _count(results: dict[str, Any]) -> int:
    return len(next(iter(results["rules"].values()))["seeds"])
