"""Plots for several objectives: their weights over time, what drives the rules, and who gained or paid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gametalearn.canvas import (
    GREY,
    entitle,
    figure,
    legend_below,
    shortened,
    style,
    tidy,
)
from gametalearn.logs import Record, Records
from gametalearn.objective_tables import ALONE, MOST
from gametalearn.tables import subject
from gametalearn.tradeoffs import non_dominated
from gametalearn.units import Units
from gametalearn.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FACTS", "objective_weights", "rule_facts", "trade_off"]

Array = np.ndarray[Any, np.dtype[np.float64]]

NAMED = 8
"""Objectives drawn by name; if there are more, those with the largest and the smallest values."""

FACTS = {
    "r": "relative inverse training rate r",
    "kappa": "performance indicator kappa",
}
"""What rules report about objectives, and its axis label."""

MARKS = "osD^vP*X<>hp"


def objective_weights(results: dict[str, Any], records: Records, width: float = 8) -> Figure | None:
    """Each objective's weight in the updates over time, a panel for each rule that distinguishes them.

    The sum of the effective weights of an objective's tasks, its mean over seeds and their range. Where
    objectives have no task in some meta-batches, and a sum would follow their number, the mean weight of
    its tasks instead, where it has some, as a multiple of equal weights 1/T. None if there is one
    objective, or if all always have the same weight.
    """
    names, absent = _names(records), False
    for runs in records.values():
        absent |= any(set(r.objectives) not in (set(names), set()) for run in runs for r in run)
    found = {}
    for rule, runs in records.items():
        curves = _curves(runs, _multiples if absent else _weight_sums)
        ends = [end for c in curves.values() for end in (np.nanmin(c), np.nanmax(c))]
        if len(curves) > 1 and max(ends) - min(ends) > 1e-9:
            found[rule] = curves
    if not found:
        return None
    columns = 2 if width >= 7 and len(found) > 1 else 1
    lines = -(-len(found) // columns)
    drawn = figure(width, 1.4 + 2.1 * lines)
    panels = drawn.subplots(lines, columns, sharex=True, squeeze=False).flatten()
    for axes in panels[len(found) :]:
        axes.remove()
    named = _named(records, names)
    handles: dict[str, Any] = {}
    for number, (axes, (rule, curves)) in enumerate(zip(panels, found.items(), strict=False)):
        handles |= _lines(axes, _iterations(records[rule]), curves, named)
        axes.set_title(shortened(rule, 40), fontsize=9)
        axes.set_ylabel("weight, times 1/T" if absent else "effective weight")
        axes.axhline(float(absent), color="black", linewidth=0.8)
        if number >= len(found) - columns:
            axes.set_xlabel("meta-iteration")
            axes.tick_params(labelbottom=True)
        tidy(axes, "y")
    what = "effective weights by objective"
    if absent:
        what = "mean effective weight of an objective's tasks, 1 if all are equal"
    entitle(drawn, _about(results), f"{what}; {_bands(records)}")
    legend_below(drawn, list(handles.values()))
    return drawn


def rule_facts(
    results: dict[str, Any], records: Records, rule: str, fact: str, width: float = 7
) -> Figure | None:
    """What drives a rule, for each objective over time: ``r`` of GradNorm, ``kappa`` of DTP."""
    runs = records[rule]
    curves = _curves(runs, lambda record: record.facts.get(fact, {}))
    if not curves:
        return None
    named = _named(records, _names(records) or list(curves))
    drawn = figure(width, 4.2)
    axes = drawn.subplots()
    handles = _lines(axes, _iterations(runs), curves, named)
    axes.set_xlabel("meta-iteration")
    axes.set_ylabel(FACTS.get(fact, fact))
    if fact == "r":
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    tidy(axes, "y")
    entitle(drawn, _about(results), f"{shortened(rule, 40)}; {_bands({rule: runs})}")
    legend_below(drawn, list(handles.values()))
    return drawn


def trade_off(results: dict[str, Any], width: float = 7) -> Figure | None:
    """The rules' scores on each objective; those on the Pareto front are ringed.

    Two objectives: one against the other, a dot for each seed and rule, and the front as a line. Three to
    twelve: a column for each, the difference from the baseline (or from the models that learned each
    alone). None for one objective, for more than twelve, or for results written by an older version.
    """
    units, rules = Units.of(results), results["rules"]
    own = {rule: entry.get("objectives", {}) for rule, entry in rules.items()}
    names = list(next(iter(own.values())))
    if not 2 <= len(names) <= MOST or not all("by_seed" in own[r][n] for r in own for n in names):
        return None
    means = [[entry[n][units.name] for n in names] for entry in own.values()]
    front = non_dominated(means, results["metric"]["higher_is_better"])
    draw = _scatter if len(names) == 2 else _columns
    drawn = figure(width, 5.2)
    axes = drawn.subplots()
    handles = draw(results, axes, names, own, front)
    tidy(axes, "both")
    some = ", ".join(shortened(rule) for rule, on in zip(own, front, strict=True) if on)
    rings = f"ringed: on the Pareto front ({some})"
    dots = "dots: seeds; large: means over seeds"
    if not results["metric"]["higher_is_better"]:
        dots += "; lower is better"
    entitle(drawn, _about(results), dots, rings)
    legend_below(drawn, handles)
    return drawn


def _scatter(
    results: dict[str, Any], axes: Any, names: list[str], own: dict[str, Any], front: list[bool]
) -> list[Any]:
    units = Units.of(results)
    scale = 100 if units.percent else 1
    handles, ends = [], []
    for i, (rule, entry) in enumerate(own.items()):
        seeds = [
            (scale * x, scale * y)
            for x, y in zip(*(entry[n]["by_seed"] for n in names), strict=True)
            if x is not None and y is not None
        ]
        mean = [scale * entry[n][units.name] for n in names]
        look = {"color": style(i)["color"], "marker": MARKS[i % len(MARKS)], "linestyle": ""}
        axes.plot(*zip(*seeds, strict=True), **look, markersize=4, alpha=0.5)
        handles += axes.plot(*mean, **look, markersize=8, label=shortened(rule))
        if front[i]:
            axes.plot(*mean, "o", markersize=14, markerfacecolor="none", color="black")
            ends.append(mean)
    ends.sort()
    axes.plot(*zip(*ends, strict=True), color="black", linewidth=0.8, zorder=0)
    for name, line in zip(names, (axes.axvline, axes.axhline), strict=True):
        if name in results.get("single", {}):
            value = scale * results["single"][name][units.name]
            handles.append(line(value, color=GREY, linestyle=":", label=ALONE))
    unit = " (%)" if units.percent else ""
    axes.set_xlabel(f"test {shortened(units.name)}{unit}, {shortened(names[0], 40)}")
    axes.set_ylabel(f"test {shortened(units.name)}{unit}, {shortened(names[1], 40)}")
    return list({handle.get_label(): handle for handle in handles}.values())


def _columns(
    results: dict[str, Any], axes: Any, names: list[str], own: dict[str, Any], front: list[bool]
) -> list[Any]:
    units = Units.of(results)
    scale = 100 if units.percent else 1
    if "single" in results:
        against, others = "learned alone", None
    else:
        baseline = results["paired"][0]["baseline"] if results["paired"] else next(iter(own))
        against, others = shortened(baseline), own[baseline]
    handles = []
    for i, (rule, entry) in enumerate(own.items()):
        means, place = [], (i - (len(own) - 1) / 2) * 0.6 / len(own)
        for column, name in enumerate(names):
            by_seed = (
                entry[name]["minus_single"]["by_seed"]
                if others is None
                else _minus(entry[name]["by_seed"], others[name]["by_seed"])
            )
            values = [scale * value for value in by_seed if value is not None]
            means.append(float(np.mean(values)))
            axes.plot(
                [column + place] * len(values), values, ".", color=style(i)["color"], alpha=0.5
            )
        at = np.arange(len(names)) + place
        handles += axes.plot(
            at, means, **style(i), marker=MARKS[i % len(MARKS)], linewidth=0.8, markersize=6,
            label=shortened(rule),
        )  # fmt: skip
        if front[i]:
            axes.plot(at, means, "o", markersize=12, markerfacecolor="none", color="black")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [shortened(name, 16) for name in names], rotation=20)
    axes.set_xlabel("objective")
    unit = " (points)" if units.percent else ""
    axes.set_ylabel(f"{shortened(units.name)} minus {against}{unit}")
    return handles


def _minus(mine: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    pairs = zip(mine, others, strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def _names(records: Records) -> list[str]:
    """The objectives that were trained on, in the order in which they appear."""
    return list(
        dict.fromkeys(
            n for runs in records.values() for run in runs for r in run for n in r.objectives
        )
    )


def _weight_sums(record: Record) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in zip(record.objectives, record.effective, strict=False):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def _multiples(record: Record) -> dict[str, float]:
    """The mean weight of each present objective's tasks, as a multiple of 1/T."""
    tasks = len(record.objectives)
    return {
        name: total * tasks / record.objectives.count(name)
        for name, total in _weight_sums(record).items()
    }


def _iterations(runs: list[list[Record]]) -> list[int]:
    """Those that every run logged."""
    return sorted(set.intersection(*({r.iteration for r in run} for run in runs)))


def _curves(
    runs: list[list[Record]], told: Callable[[Record], Mapping[str, float]]
) -> dict[str, Array]:
    """For each objective, a value per seed and logged iteration, ``(S, N)``; NaN where it is absent.

    A running mean if there are many lines, over those in its window that have a value.
    """
    iterations = _iterations(runs)
    found: dict[str, Array] = {}
    for seed, run in enumerate(runs):
        at = {r.iteration: r for r in run}
        for place, iteration in enumerate(iterations):
            for name, value in told(at[iteration]).items():
                empty = np.full((len(runs), len(iterations)), math.nan)
                found.setdefault(name, empty)[seed, place] = value
    half = _window(iterations) // 2
    return {name: _smoothed(values, half) for name, values in found.items()}


def _window(iterations: Sequence[int]) -> int:
    """Logged iterations in a running mean; an odd number."""
    return 2 * (len(iterations) // 40) + 1


def _smoothed(values: Array, half: int) -> Array:
    if not half:
        return values
    there = np.isfinite(values)
    ones = np.ones(2 * half + 1)
    total = [np.convolve(row, ones, "same") for row in np.where(there, values, 0.0)]
    count = [np.convolve(row, ones, "same") for row in there.astype(float)]
    mean = np.divide(total, count, out=np.full_like(values, math.nan), where=np.array(count) > 0)
    return np.where(there, mean, math.nan)


def _named(records: Records, names: Sequence[str]) -> list[str]:
    """The objectives that get their own colours, the same in every plot of a comparison.

    All of them if they are few; else those with the largest and the smallest weights over all rules.
    """
    if len(names) <= NAMED:
        return list(names)
    told: dict[str, list[float]] = {name: [] for name in names}
    for runs in records.values():
        for record in (r for run in runs for r in run):
            for name, value in _multiples(record).items():
                told[name].append(value)
    ranked = sorted(names, key=lambda name: -float(np.mean(told[name])) if told[name] else 0.0)
    return [*ranked[: NAMED // 2], *ranked[-NAMED // 2 :]]


def _lines(
    axes: Any, iterations: list[int], curves: dict[str, Array], names: list[str]
) -> dict[str, Any]:
    """Draw a line for each objective, the mean over seeds that have a value; return the handles by label."""
    handles: dict[str, Any] = {}
    x = np.array(iterations)
    rest = [name for name in curves if name not in names]
    for name in [*rest, *(n for n in names if n in curves)]:
        values = curves[name]
        some = np.isfinite(values).any(0)
        low, high, mean = (f(values[:, some], axis=0) for f in (np.nanmin, np.nanmax, np.nanmean))
        if name in rest:
            look = {"color": "#CCCCCC", "linewidth": 0.7, "zorder": 0}
            label = counted(len(rest), "other objective")
        else:
            look, label = style(names.index(name)), shortened(name)
            axes.fill_between(x[some], low, high, color=look["color"], alpha=0.15, linewidth=0)
        (handles[label],) = axes.plot(x[some], mean, **look, label=label)
    return handles


def _bands(records: Records) -> str:
    """What lines and bands show."""
    runs = next(iter(records.values()))
    text = "mean over seeds; bands: their range" if len(runs) > 1 else "one seed"
    window = _window(_iterations(runs))
    return text + (f"; running mean over {window} logged iterations" if window > 1 else "")


def _about(results: dict[str, Any]) -> str:
    seeds = next(iter(results["rules"].values()))["seeds"]
    return f"{subject(results)}, {results['learner']}, {counted(len(seeds), 'seed')}"
