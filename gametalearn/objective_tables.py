"""Several objectives of a comparison in tables: their means, what each gained or paid, ranks, Delta_m."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gametalearn.config import OF_OBJECTIVES
from gametalearn.statistics import FEWEST
from gametalearn.units import Units, interval_of
from gametalearn.words import image_size

__all__ = ["ALONE", "objective_notes", "objective_tables"]

ALONE = "(alone)"
"""The line for the models that each learned one objective."""

MOST = 12
"""The most groups of one data set, such as alphabets, that get a column each."""

Table = tuple[str, list[str], list[list[str]]]
"""A caption, a header and the cells below it."""


def objective_tables(results: dict[str, Any], width: float = math.inf) -> list[Table]:
    """Tables that show how a comparison came out on each of several objectives.

    The means, with those of models that learned one objective alone below them; the differences from the
    baseline; those from the single-objective models; mean rank and Delta_m. A table has as many columns
    as fit into ``width``; for more than `MOST` groups (``--objectives group``) there is only the last table.
    None for one objective.
    """
    rules, metric = results["rules"], results["metric"]
    name, percent = metric["name"], metric["format"] == "percent"
    means = {rule: entry.get("objectives", {}) for rule, entry in rules.items()}
    if not next(iter(means.values())):
        return []
    found: list[Table] = []
    seeds = len(next(iter(rules.values()))["seeds"])
    bracket = " [95%]" if seeds >= FEWEST else ""
    if results["config"].get("objectives") != "group" or len(next(iter(means.values()))) <= MOST:
        single = results.get("single", {})
        lines = {**means, **({ALONE: single} if single else {})}
        units = {  # of each objective, as their scores may be of different size
            of: Units.fitting(name, percent, max(abs(own[of][name]) for own in lines.values()))
            for of in next(iter(means.values()))
        }

        def mean(of: str, entry: dict[str, Any]) -> str:
            return units[of].with_half(entry[name], entry["ci95"])

        def difference(of: str, entry: dict[str, Any]) -> str:
            return units[of].difference(entry)

        caption = f"test {Units.of(results).heading}, each objective"
        found += _tables(caption, lines, mean, width)
        unit = "points" if percent else name
        pairs = {p["rule"]: p["objectives"] for p in results["paired"] if "objectives" in p}
        if pairs:
            caption = f"each objective minus {results['paired'][0]['baseline']}, {unit}{bracket}"
            found += _tables(caption, pairs, difference, width)
        if single:
            alone = {r: {n: e["minus_single"] for n, e in own.items()} for r, own in means.items()}
            caption = f"each objective minus that of models that learned it alone, {unit}{bracket}"
            found += _tables(caption, alone, difference, width)
    return [*found, *_overall(rules, bracket)]


def _overall(rules: dict[str, Any], bracket: str) -> list[Table]:
    """Mean rank and Delta_m, if present."""
    header, columns = ["rule"], [list(rules)]
    if all("mean_rank" in entry for entry in rules.values()):
        header.append("mean rank")
        columns.append([f"{entry['mean_rank']:.2f}" for entry in rules.values()])
    changes = [entry.get("delta_m") for entry in rules.values()]
    if all(changes):
        header.append(f"Delta_m %{bracket}")
        columns.append([_percent(change) for change in changes])
    if len(columns) == 1:
        return []
    return [("over the objectives", header, [list(line) for line in zip(*columns, strict=True)])]


def _percent(change: dict[str, Any]) -> str:
    return interval_of(change["mean"], change, lambda value: f"{100 * value:+z.2f}")


def objective_notes(results: dict[str, Any]) -> list[str]:
    """What the columns of `objective_tables` mean."""
    rules = results["rules"].values()
    found = _absent(results)
    if images := results.get("brought_to"):
        shown = image_size(images["image_size"], images["channels"])
        found.append(f"Images of all objectives were converted to {shown}.")
    if all("mean_rank" in entry for entry in rules):
        found.append(
            f"The mean rank is over the objectives: 1 is the best of the {len(rules)} rules, and ties "
            "share a rank."
        )
    if "single" in results:
        found.append(
            "Delta_m is the mean over objectives of the relative change against models that learned "
            f"one objective alone, {ALONE}, of means over seeds; below 0, learning them together costs "
            "performance."
        )
        if None in [entry["delta_m"] for entry in rules]:
            found[-1] = (
                "Delta_m is undefined: a model that learned one objective alone has a mean of 0."
            )
    return [*found, *_of_single(results), *_of_balance(results)]


def _absent(results: dict[str, Any]) -> list[str]:
    """Objectives that had no test episode on some seeds; the rules' episodes are the same."""
    own = next(iter(results["rules"].values())).get("objectives", {})
    without = [name for name, entry in own.items() if None in entry.get("by_seed", ())]
    if not without:
        return []
    one = len(without) == 1
    return [
        f"On some seeds, {', '.join(without)} had no test episode; means on these seeds are over the others, "
        f"and {'its own is' if one else 'their own are'} over the seeds on which there were some. More "
        "--episodes help."
    ]


def _of_single(results: dict[str, Any]) -> list[str]:
    """Single-objective models that were given, and are not what the comparison would have trained."""
    found = []
    for name, one in results.get("single", {}).items():
        if one["tasks"] != one["budget"]:
            found.append(
                f"The models trained on {name} alone saw {one['tasks']} of its tasks, the rules' models "
                f"{one['budget']}: Delta_m compares unequal budgets."
            )
        if others := one.get("differs"):
            found.append(
                f"The models trained on {name} alone differ from the rules' models in more than the "
                f"objective: {', '.join(others)}."
            )
    return found


def _of_balance(results: dict[str, Any]) -> list[str]:
    """Where rules over objectives differ from the plain mean of tasks before they do anything."""
    config = results["config"]
    varying = config.get("objectives") == "group" or config.get("share") == "proportional"
    rules = [rule for rule in results["rules"] if rule in OF_OBJECTIVES]
    if not varying or not rules or "uniform" not in results["rules"]:
        return []
    one = len(rules) == 1
    return [
        f"With equal weights, {' and '.join([', '.join(rules[:-1])] * (not one) + rules[-1:])} "
        f"count{'s' * one} every objective in a meta-batch the same, and uniform every task. The numbers of "
        "tasks vary here, so that part of any difference from uniform is this."
    ]


def _tables(
    caption: str,
    lines: Mapping[str, Mapping[str, Any]],
    show: Callable[[str, Any], str],
    width: float,
) -> list[Table]:
    """A line for each rule and a column for each objective, as many columns in a table as fit."""
    names = list(next(iter(lines.values())))
    first = ["rule", *lines]
    blocks: list[list[Sequence[str]]] = []
    used = 0
    for name in names:
        column = [name, *(show(name, own[name]) if name in own else "" for own in lines.values())]
        more = 2 + max(map(len, column))
        if not blocks or used + more > width:
            blocks.append([first])
            used = max(map(len, first))
        blocks[-1].append(column)
        used += more
    turned = ([list(line) for line in zip(*block, strict=True)] for block in blocks)
    return [(caption, block[0], block[1:]) for block in turned]
