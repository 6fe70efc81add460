"""Several objectives of a comparison in tables: their means, what each gained or paid, ranks, Delta_m."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gametalearn.units import Units, interval_of
from gametalearn.words import image_size

__all__ = ["ALONE", "objective_notes", "objective_tables"]

ALONE = "(alone)"
"""The line for the models that each learned one objective."""

Table = tuple[str, list[str], list[list[str]]]
"""A caption, a header and the cells below it."""


def objective_tables(results: dict[str, Any], width: float = math.inf) -> list[Table]:
    """Tables that show how a comparison came out on each of several objectives.

    The means, with those of models that learned one objective alone below them; the differences from the
    baseline; those from the single-objective models; mean rank and Delta_m. A table has as many columns
    as fit into ``width``; for dozens of alphabets (``--objectives group``) there is only the last table.
    None for one objective.
    """
    units, rules = Units.of(results), results["rules"]
    means = {rule: entry.get("objectives", {}) for rule, entry in rules.items()}
    if not next(iter(means.values())):
        return []
    found: list[Table] = []
    if results["config"].get("objectives") != "group":
        single = results.get("single", {})
        lines = {**means, **({ALONE: single} if single else {})}
        caption = f"test {units.heading}, each objective"
        found += _tables(caption, lines, lambda e: units.with_half(e[units.name], e["ci95"]), width)
        unit = "points" if units.percent else units.name
        pairs = {p["rule"]: p["objectives"] for p in results["paired"] if "objectives" in p}
        if pairs:
            caption = f"each objective minus {results['paired'][0]['baseline']}, {unit} [95%]"
            found += _tables(caption, pairs, units.difference, width)
        if single:
            alone = {r: {n: e["minus_single"] for n, e in own.items()} for r, own in means.items()}
            caption = f"each objective minus that of models that learned it alone, {unit} [95%]"
            found += _tables(caption, alone, units.difference, width)
    return [*found, *_overall(rules)]


def _overall(rules: dict[str, Any]) -> list[Table]:
    """Mean rank and Delta_m, if present."""
    header, columns = ["rule"], [list(rules)]
    if all("mean_rank" in entry for entry in rules.values()):
        header.append("mean rank")
        columns.append([f"{entry['mean_rank']:.2f}" for entry in rules.values()])
    changes = [entry.get("delta_m") for entry in rules.values()]
    if all(changes):
        header.append("Delta_m % [95%]")
        columns.append([_percent(change) for change in changes])
    if len(columns) == 1:
        return []
    return [("over the objectives", header, [list(line) for line in zip(*columns, strict=True)])]


def _percent(change: dict[str, Any]) -> str:
    return interval_of(change["mean"], change, lambda value: f"{100 * value:+z.2f}")


def objective_notes(results: dict[str, Any]) -> list[str]:
    """What the columns of `objective_tables` mean."""
    rules = results["rules"].values()
    found = []
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
            f"one objective alone, {ALONE}; below 0, learning them together costs performance."
        )
        if None in [entry["delta_m"] for entry in rules]:
            found[-1] = (
                "Delta_m is undefined: a model that learned one objective alone has a mean of 0."
            )
    return found


def _tables(
    caption: str,
    lines: Mapping[str, Mapping[str, Any]],
    show: Callable[[Any], str],
    width: float,
) -> list[Table]:
    """A line for each rule and a column for each objective, as many columns in a table as fit."""
    names = list(next(iter(lines.values())))
    first = ["rule", *lines]
    blocks: list[list[Sequence[str]]] = []
    used = 0
    for name in names:
        column = [name, *(show(own[name]) if name in own else "" for own in lines.values())]
        more = 2 + max(map(len, column))
        if not blocks or used + more > width:
            blocks.append([first])
            used = max(map(len, first))
        blocks[-1].append(column)
        used += more
    turned = ([list(line) for line in zip(*block, strict=True)] for block in blocks)
    return [(caption, block[0], block[1:]) for block in turned]
