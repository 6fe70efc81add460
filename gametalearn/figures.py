"""A comparison's pictures, as figures of matplotlib: of ``results.json`` and the runs' metrics."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gametalearn.errors import InputError, summary
from gametalearn.jobs import place_of
from gametalearn.statistics import FEWEST
from gametalearn.tables import Units, verdict_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "Record",
    "accuracy",
    "differences",
    "drawing",
    "figure",
    "learning_curves",
    "records_of",
    "vary",
    "weights",
]

COLOURS = ("#4477AA", "#EE6677", "#228833", "#997700", "#009988", "#AA3377", "#777777", "#000000")
"""After Paul Tol's bright scheme, distinct for colour-blind readers; each has a contrast of 3 to 1
with white, for which two of his were darkened."""

STYLES = ("-", "--", "-.", ":")
"""Lines that differ without their colours."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """A name is drawn as it is, dollar signs too; an SVG holds its text as text, always the same."""
    import matplotlib

    settings: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "gametalearn",
    }
    with matplotlib.rc_context(settings):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure that no window shows; its size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(found)
    return found


@dataclass(frozen=True)
class Record:
    """What is drawn of a line of ``metrics.jsonl``; ``validation`` is NaN where it diverged."""

    iteration: int
    effective: np.ndarray[Any, np.dtype[np.float64]]
    validation: float | None
    skipped: int = 0


Records = dict[str, list[list[Record]]]
"""Of each rule, for each seed."""


def records_of(folder: Path, results: dict[str, Any]) -> Records:
    """The metrics of a comparison's runs, which lie below its folder.

    Raises:
        InputError: a run's metrics are missing or damaged.
    """
    metric = results["metric"]["name"]
    return {
        rule: [_records(place_of(folder, rule, one["seed"]), metric) for one in entry["seeds"]]
        for rule, entry in results["rules"].items()
    }


def _records(place: Path, metric: str) -> list[Record]:
    file = place / "metrics.jsonl"
    try:
        records = []
        for line in file.read_text().splitlines():
            r = json.loads(line)
            value = r["validation"][metric] if "validation" in r else None
            value = math.nan if "validation" in r and value is None else value
            effective = np.array(r["effective"], dtype=np.float64).reshape(-1)
            record = Record(
                int(r["iteration"]), effective, value and float(value), int(r.get("skipped", 0))
            )
            records.append(record)
        if not records or not len(records[0].effective):
            raise ValueError("no lines")
    except (OSError, LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(
            f"{file}: cannot be read ({summary(error)}); the results stand, only the plots need it"
        ) from error
    return records


def learning_curves(results: dict[str, Any], records: Records, width: float = 7) -> Figure:
    """Validation over the iterations: the mean over seeds, and their range."""
    units, found = Units.of(results), figure(width, 4.2)
    axes = found.subplots()
    scale = 100 if units.percent else 1
    for i, (rule, runs) in enumerate(records.items()):
        curves = [
            {r.iteration: r.validation * scale for r in run if r.validation is not None}
            for run in runs
        ]
        iterations = sorted(set.intersection(*(set(c) for c in curves)))
        values = np.array([[c[i] for i in iterations] for c in curves])
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        axes.plot(
            iterations, values.mean(0), style, color=colour, label=_short(rule), marker="o",
            markersize=3,
        )  # fmt: skip
        if len(values) > 1:
            axes.fill_between(
                iterations, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
            )
    axes.set_xlabel("meta-iteration")
    axes.set_ylabel(_label("validation", units))
    several = any(len(runs) > 1 for runs in records.values())
    axes.set_title(
        "Mean over seeds; the band is their range" if several else "One seed", fontsize=10
    )
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes, "y")
    return found


def accuracy(results: dict[str, Any], width: float = 7) -> Figure:
    """Each rule's mean and its interval over seeds, and every seed, joined between rules."""
    units, rules = Units.of(results), results["rules"]
    found = figure(width, 1.5 + 0.55 * len(rules))
    axes = found.subplots()
    scale = 100 if units.percent else 1
    seeds = [
        [scale * one[units.name] for one in entry["seeds"]] for entry in rules.values()
    ]  # (rules, seeds)
    for one in zip(*seeds, strict=True):
        axes.plot(one, range(len(rules)), color="#999999", linewidth=0.7, zorder=1)
    labels = []
    for i, entry in enumerate(rules.values()):
        half = entry["ci95"]
        text = units.show(entry[units.name]) + ("" if half is None else f" ± {units.show(half)}")
        labels.append(text)
        _estimate(axes, i, scale * entry[units.name], seeds[i], half and scale * half)
    _rows(axes, list(rules), labels)
    axes.set_xlabel(_label("test", units))
    several = len(seeds[0]) >= FEWEST
    what = "Mean and 95% interval over seeds" if several else "Mean over seeds"
    axes.set_title(f"{what};\ndots: the seeds, joined between the rules", fontsize=10)
    return found


def differences(results: dict[str, Any], width: float = 7) -> Figure:
    """Each rule's difference from the baseline, on every seed and in the mean."""
    units, pairs = Units.of(results), results["paired"]
    found = figure(width, 1.6 + 0.55 * len(pairs))
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
    name = "accuracy" if units.name == "accuracy" else _short(units.name)
    unit = " (points)" if units.percent else ""
    axes.set_xlabel(
        f"{name} minus that of {_short(pairs[0]['baseline'])}{unit}; {better} is better"
    )
    what = "Mean and 95% interval over seeds" if several else "Mean over seeds"
    axes.set_title(f"{what}; dots: the seeds", fontsize=10)
    return found


def vary(runs: list[list[Record]]) -> bool:
    """Whether a rule's weights differ between tasks."""
    return any(np.ptp(r.effective) > 1e-9 for r in runs[0])


def weights(
    rule: str, runs: list[list[Record]], width: float = 8, most: int | None = None
) -> Figure:
    """Effective weights of the first seed; below them, if there are any, the negative ones' share.

    Of a long run ``most`` lines of the log are drawn, evenly spread over it; None draws all.
    """
    negative = any((r.effective < 0).any() for run in runs for r in run)
    found = figure(width, 5.4 if negative else 3.8)
    panels = found.subplots(
        1 + negative, 1, sharex=True, squeeze=False, height_ratios=[2.2, 1][: 1 + negative]
    )[:, 0]
    upper, last = panels[0], panels[-1]
    shown = [runs[0][i] for i in _spread(len(runs[0]), most)]
    x = np.concatenate([np.full(len(r.effective), r.iteration) for r in shown])
    y = np.concatenate([r.effective for r in shown])
    for which, colour in ((y >= 0, COLOURS[0]), (y < 0, COLOURS[1])):
        upper.plot(
            x[which], y[which], "o", color=colour, alpha=0.5, markersize=2, markeredgewidth=0
        )
    tasks = len(runs[0][0].effective)
    upper.axhline(
        1 / tasks, color="black", linewidth=0.8, linestyle="--", label=f"uniform, 1/{tasks}"
    )
    upper.axhline(0, color="black", linewidth=0.8)
    upper.set_ylabel("weight of each task")
    legend = "red: negative" if negative else "none of them negative"
    upper.set_title(f"{_short(rule)}\nweights on the first seed; {legend}", fontsize=10)
    upper.legend(frameon=False, fontsize=9)
    if negative:
        for run in runs:
            share = _smooth([100 * float(np.mean(r.effective < 0)) for r in run])
            places = _spread(len(run), most)
            last.plot(
                [run[i].iteration for i in places], share[places], color=COLOURS[1], alpha=0.8
            )
        last.set_ylabel("negative (%)")
        last.set_ylim(0, max(5.0, last.get_ylim()[1]))
    last.set_xlabel("meta-iteration")
    last.set_xlim(0, runs[0][-1].iteration)
    for axes in panels:
        _tidy(axes, "y")
    return found


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
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.6)
    for row, text in enumerate(labels):
        axes.annotate(
            text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9
        )
    _tidy(axes, "x")


def _tidy(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)


def _label(which: str, units: Units) -> str:
    """What an axis shows."""
    name = "MSE" if units.name == "mse" else _short(units.name)
    return f"{which} {name}{' (%)' if units.percent else ''}"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _spread(count: int, most: int | None) -> list[int]:
    """The numbers below ``count``, or ``most`` of them from the first to the last."""
    if most is None or count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()  # type: ignore[no-any-return]


def _smooth(values: list[float]) -> np.ndarray[Any, Any]:
    """A running mean over a twentieth of the run."""
    window = max(1, len(values) // 20)
    padded = np.pad(np.array(values), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")
