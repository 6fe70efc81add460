"""A comparison's pictures, as figures of matplotlib: of ``results.json`` and the runs' metrics."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from gametalearn.canvas import (
    COLOURS,
    GREY,
    entitle,
    figure,
    legend_below,
    shortened,
    style,
    tidy,
)
from gametalearn.logs import Record, Records
from gametalearn.statistics import FEWEST
from gametalearn.tables import subject, verdict_of
from gametalearn.units import Units
from gametalearn.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "accuracy",
    "differences",
    "learning_curves",
    "vary",
    "weights",
]

Array = np.ndarray[Any, np.dtype[np.float64]]

NAMED = 8
"""Objectives that have colours of their own; of more, those with the largest and smallest weights."""


def learning_curves(results: dict[str, Any], records: Records, width: float = 7) -> Figure:
    """Validation over the iterations: the mean over seeds, and their range."""
    units, found = Units.of(results), figure(width, 4.6)
    axes = found.subplots()
    scale = 100 if units.percent else 1
    lines: list[Any] = []
    for i, (rule, runs) in enumerate(records.items()):
        curves = [
            {r.iteration: r.validation * scale for r in run if r.validation is not None}
            for run in runs
        ]
        iterations = sorted(set.intersection(*(set(c) for c in curves)))
        values = np.array([[c[i] for i in iterations] for c in curves])
        lines += axes.plot(
            iterations, values.mean(0), **style(i), label=shortened(rule), marker="o", markersize=3
        )
        if len(values) > 1:
            axes.fill_between(
                iterations, values.min(0), values.max(0), color=style(i)["color"], alpha=0.12,
                linewidth=0,
            )  # fmt: skip
    axes.set_xlabel("meta-iteration")
    axes.set_ylabel(_label("validation", units))
    several = any(len(runs) > 1 for runs in records.values())
    entitle(found, _about(results), "mean over seeds; bands: their range" if several else "")
    legend_below(found, lines)
    tidy(axes, "both")
    return found


def accuracy(results: dict[str, Any], width: float = 7) -> Figure:
    """Each rule's mean and its interval over seeds, and every seed, joined between rules."""
    units, rules = Units.of(results), results["rules"]
    found = figure(width, 1.6 + 0.55 * len(rules))
    axes = found.subplots()
    scale = 100 if units.percent else 1
    seeds = [
        [scale * one[units.name] for one in entry["seeds"]] for entry in rules.values()
    ]  # (rules, seeds)
    for one in zip(*seeds, strict=True):
        axes.plot(one, range(len(rules)), color=GREY, linewidth=0.7, zorder=1)
    labels = []
    for i, entry in enumerate(rules.values()):
        half = entry["ci95"]
        text = units.show(entry[units.name]) + ("" if half is None else f" ± {units.show(half)}")
        labels.append(text)
        _estimate(axes, i, scale * entry[units.name], seeds[i], half and scale * half)
    _rows(axes, list(rules), labels)
    axes.set_xlabel(_label("test", units))
    entitle(found, _about(results), f"{_squares(results)}; dots: seeds, joined between the rules")
    return found


def differences(results: dict[str, Any], width: float = 7) -> Figure:
    """Each rule's difference from the baseline, on every seed and in the mean."""
    units, pairs = Units.of(results), results["paired"]
    found = figure(width, 1.7 + 0.55 * len(pairs))
    axes = found.subplots()
    scale = 100 if units.percent else 1
    axes.axvline(0, color="black", linewidth=0.8)
    for i, pair in enumerate(pairs):
        half = None if pair["ci95"] is None else (pair["ci95"][1] - pair["ci95"][0]) / 2
        values = [scale * d for d in pair["by_seed"]]
        _estimate(axes, i, scale * pair["difference"], values, half and scale * half, i + 1)
    several = len(pairs[0]["by_seed"]) >= FEWEST
    labels = [verdict_of(results, p).replace(" shown", "\nshown") if several else "" for p in pairs]
    _rows(axes, [pair["rule"] for pair in pairs], labels)
    better = "right" if results["metric"]["higher_is_better"] else "left"
    name = "accuracy" if units.name == "accuracy" else shortened(units.name)
    unit = " (points)" if units.percent else ""
    baseline = shortened(pairs[0]["baseline"])
    label = f"test {name} minus that of {baseline}{unit}; {better} is better"
    axes.set_xlabel("\n".join(textwrap.wrap(label, int(width * 11))))
    entitle(found, _about(results), f"{_squares(results)}; dots: seeds")
    return found


def vary(runs: list[list[Record]]) -> bool:
    """Whether a rule's weights differ between tasks."""
    return any(np.ptp(r.effective) > 1e-9 for r in runs[0])


def weights(
    results: dict[str, Any],
    rule: str,
    runs: list[list[Record]],
    width: float = 8,
    most: int | None = None,
) -> Figure:
    """Effective weights of the first seed; below them, if there are any, the negative ones' share.

    With several objectives the colour tells a task's; otherwise, whether its weight is negative. Of a
    long run ``most`` lines of the log are drawn, evenly spread over it; None draws all.
    """
    negative = any((r.effective < 0).any() for run in runs for r in run)
    found = figure(width, 5.8 if negative else 4.2)
    panels = found.subplots(
        1 + negative, 1, sharex=True, squeeze=False, height_ratios=[2.2, 1][: 1 + negative]
    )[:, 0]
    upper, last = panels[0], panels[-1]
    shown = [runs[0][i] for i in _spread(len(runs[0]), most)]
    x = np.concatenate([np.full(len(r.effective), r.iteration) for r in shown])
    y = np.concatenate([r.effective for r in shown])
    handles: list[Any] = []
    for label, which, colour in _kinds(runs[0], shown, y):
        handles += upper.plot(
            x[which], y[which], "o", color=colour, alpha=0.6, markersize=3, markeredgewidth=0,
            label=label,
        )  # fmt: skip
    tasks = len(runs[0][0].effective)
    even = upper.axhline(
        1 / tasks, color="black", linewidth=0.8, linestyle="--", label=f"uniform, 1/{tasks}"
    )
    upper.axhline(0, color="black", linewidth=0.8)
    upper.set_ylabel("effective weight of a task")
    if negative:
        _share_of_negative(last, runs, most)
    last.set_xlabel("meta-iteration")
    last.margins(x=0.02)  # the dots of the last line are whole
    logged = counted(len(runs[0]), "logged iteration")
    drawn = f"{len(shown)} of {logged}" if len(shown) < len(runs[0]) else logged
    seed = results["rules"][rule]["seeds"][0]["seed"]
    entitle(
        found,
        _about(results),
        f"{shortened(rule, 40)}: the tasks of a meta-batch, seed {seed}, {drawn}",
    )
    legend_below(found, [*handles, even])
    for axes in panels:
        tidy(axes, "y")
    return found


def _kinds(run: list[Record], shown: list[Record], y: Array) -> list[tuple[str, Any, str]]:
    """What dots are told apart by: a name, which of ``y`` they are, and their colour."""
    sums: dict[str, list[float]] = {}
    for record in run:
        for name, value in zip(record.objectives, record.effective, strict=False):
            sums.setdefault(name, []).append(float(value))
    if len(sums) < 2:
        signs = [("weight of a task", y >= 0, COLOURS[0]), ("negative", y < 0, COLOURS[1])]
        return [kind for kind in signs if kind[1].any()]
    ranked = sorted(sums, key=lambda name: -float(np.mean(sums[name])))
    if len(ranked) > NAMED:
        ranked = [*ranked[: NAMED // 2 - 1], *ranked[1 - NAMED // 2 :]]
    names = np.array([name for record in shown for name in record.objectives])
    rest = ~np.isin(names, ranked)
    kinds = [(shortened(n), names == n, COLOURS[i]) for i, n in enumerate(ranked)]
    others = [(f"the other {len(sums) - len(ranked)}", rest, "#CCCCCC")] if rest.any() else []
    return [*others, *(kind for kind in kinds if kind[1].any())]


def _share_of_negative(axes: Any, runs: list[list[Record]], most: int | None) -> None:
    """A line for each seed, smoothed if there are many lines in the log, which its label says."""
    window = max(1, len(runs[0]) // 20)
    for run in runs:
        share = _smooth([100 * float(np.mean(r.effective < 0)) for r in run], window)
        places = _spread(len(run), most)
        axes.plot(
            [run[i].iteration for i in places], share[places], color=COLOURS[1], alpha=0.8,
            linewidth=1,
        )  # fmt: skip
    axes.set_ylabel("negative (%)")
    axes.set_ylim(-2, max(5.0, axes.get_ylim()[1]))
    smoothed = f", running mean over {window} logged iterations" if window > 1 else ""
    title = f"share of negative weights, a line per seed{smoothed}"
    axes.set_title(
        "\n".join(textwrap.wrap(title, int(axes.figure.get_figwidth() * 13))), fontsize=9
    )


def _estimate(
    axes: Any,
    row: int,
    mean: float,
    seeds: list[float],
    half: float | None,
    colour: int | None = None,
) -> None:
    """A mean with its interval in a row, and the seeds' own values a little below it."""
    shade = COLOURS[(row if colour is None else colour) % len(COLOURS)]
    axes.plot(seeds, [row] * len(seeds), ".", color=shade, alpha=0.7, markersize=7, zorder=2)
    axes.errorbar(
        mean, row - 0.18, xerr=half or None, color=shade, fmt="s", capsize=4, markersize=6, zorder=3
    )


def _rows(axes: Any, names: list[str], labels: list[str]) -> None:
    """Name the rows from the top on, and say at the right what each shows."""
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.6)
    for row, text in enumerate(labels):
        axes.annotate(
            text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9
        )
    tidy(axes, "x")


def _about(results: dict[str, Any]) -> str:
    """What a picture is about: data set, ways, shots, learner, seeds."""
    seeds = [one["seed"] for one in next(iter(results["rules"].values()))["seeds"]]
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{subject(results)}, {results['learner']}, {told}"


def _squares(results: dict[str, Any]) -> str:
    """What the large marks are."""
    seeds = next(iter(results["rules"].values()))["seeds"]
    several = len(seeds) >= FEWEST
    return "squares: mean and 95% interval over seeds" if several else "squares: mean over seeds"


def _label(which: str, units: Units) -> str:
    """What an axis shows."""
    name = "MSE" if units.name == "mse" else shortened(units.name)
    return f"{which} {name}{' (%)' if units.percent else ''}"


def _spread(count: int, most: int | None) -> list[int]:
    """The numbers below ``count``, or ``most`` of them from the first to the last."""
    if most is None or count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()  # type: ignore[no-any-return]


def _smooth(values: list[float], window: int) -> Array:
    """A running mean over ``window`` values, at the ends over those that there are."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
