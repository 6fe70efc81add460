"""Pictures: a comparison's learning curves, accuracies and weights, and sheets of episodes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gametalearn.comparison import Comparison
from gametalearn.episodes import TaskBatch
from gametalearn.errors import InputError, summary
from gametalearn.evaluation import ci95
from gametalearn.files import replacing
from gametalearn.scores import Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["contact_sheet", "plot_comparison"]

COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#000000")
"""Paul Tol's bright scheme, distinct for colour-blind readers."""


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, file: Path, dpi: int) -> Path:
    """Write a figure in the format of the file's suffix, or not at all."""
    kinds = figure.canvas.get_supported_filetypes()
    if (kind := file.suffix.lower().lstrip(".")) not in kinds:
        raise InputError(f"{file}: pictures are {', '.join(sorted(kinds))}; end its name on one")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{file.parent}: cannot be made ({error.strerror})") from error
    with replacing(file) as stream:
        figure.savefig(stream, dpi=dpi, format=kind)
    return file


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw a comparison from its runs' ``metrics.jsonl`` below ``folder``; the files written.

    ``learning_curves.png`` (validation, the mean over seeds and their range),
    ``accuracy.png`` (or ``mse.png``, by the score's name: test, 95% intervals), and for each rule
    whose weights vary over tasks ``weights-RULE.png``.
    """
    score = comparison.score
    records = {
        rule: [
            _records(folder / rule.replace(":", "-") / f"seed{seed}", score.name)
            for seed in comparison.seeds
        ]
        for rule in comparison.results
    }
    written = [
        _learning_curves(records, score, folder / "learning_curves.png"),
        _bars(comparison, folder / f"{_file_name(score.name)}.png"),
    ]
    for rule, runs in records.items():
        if any(np.ptp(r.effective) > 1e-9 for r in runs[0]):
            written.append(_weights(rule, runs, folder / f"weights-{rule.replace(':', '-')}.png"))
    return written


def _file_name(name: str) -> str:
    """A score's name without what a file system may object to."""
    return re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "score"


def _label(which: str, score: Score) -> str:
    """What an axis shows."""
    unit = " (%)" if score.format == "percent" else ""
    return f"{which} {'MSE' if score.name == 'mse' else score.name}{unit}"


@dataclass(frozen=True)
class _Record:
    """What is drawn of a line of ``metrics.jsonl``; ``validation`` is NaN where it diverged."""

    iteration: int
    effective: np.ndarray[Any, np.dtype[np.float64]]
    validation: float | None


def _records(place: Path, metric: str) -> list[_Record]:
    file = place / "metrics.jsonl"
    try:
        records = []
        for line in file.read_text().splitlines():
            r = json.loads(line)
            value = r["validation"][metric] if "validation" in r else None
            value = math.nan if "validation" in r and value is None else value
            effective = np.array(r["effective"], dtype=np.float64).reshape(-1)
            records.append(_Record(int(r["iteration"]), effective, value and float(value)))
        if not records or not len(records[0].effective):
            raise ValueError("no lines")
    except (OSError, LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(
            f"{file}: cannot be read ({summary(error)}); the results stand, only the plots need it"
        ) from error
    return records


def _learning_curves(records: dict[str, list[list[_Record]]], score: Score, file: Path) -> Path:
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    scale = 100 if score.format == "percent" else 1
    for (rule, runs), colour in zip(records.items(), _colours(len(records)), strict=True):
        curves = [
            {r.iteration: r.validation * scale for r in run if r.validation is not None}
            for run in runs
        ]
        iterations = sorted(set.intersection(*(set(c) for c in curves)))
        values = np.array([[c[i] for i in iterations] for c in curves])
        axes.plot(iterations, values.mean(0), color=colour, label=rule, marker="o", markersize=3)
        if len(values) > 1:
            axes.fill_between(
                iterations, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
            )
    axes.set_xlabel("meta-iteration")
    axes.set_ylabel(_label("validation", score))
    axes.set_title("Mean over seeds; the band is their range", fontsize=10)
    axes.legend(frameon=False)
    _tidy(axes)
    return _saved(figure, file, 140)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _bars(comparison: Comparison, file: Path) -> Path:
    figure = _figure(2.2 + 1.1 * len(comparison.results), 4.2)
    axes = figure.subplots()
    percent = comparison.score.format == "percent"
    scale = 100 if percent else 1
    rules = list(comparison.results)
    means = [comparison.mean(r) * scale for r in rules]
    halves = [ci95(comparison.pooled(r)) * scale for r in rules]
    for i, (rule, colour) in enumerate(zip(rules, _colours(len(rules)), strict=True)):
        axes.errorbar(i, means[i], yerr=halves[i], color=colour, fmt="s", capsize=5, markersize=7)
        seeds = [r.evaluation.mean * scale for r in comparison.results[rule]]
        axes.plot([i + 0.12] * len(seeds), seeds, ".", color=colour, alpha=0.6)
        axes.annotate(
            f"{means[i]:.{2 if percent else 3}f}", (i, means[i]), (-10, 0),
            textcoords="offset points", ha="right", va="center", fontsize=9,
        )  # fmt: skip
    axes.set_xticks(range(len(rules)), rules, rotation=20 if len(rules) > 4 else 0)
    axes.set_xlim(-0.7, len(rules) - 0.5)
    axes.set_ylabel(_label("test", comparison.score))
    axes.set_title("95% interval over episodes; dots: seeds", fontsize=10)
    _tidy(axes)
    return _saved(figure, file, 140)


def _weights(rule: str, runs: list[list[_Record]], file: Path) -> Path:
    """Effective weights of the first seed; below them, if there are any, the negative ones' share."""
    negative = any((r.effective < 0).any() for run in runs for r in run)
    figure = _figure(8, 5.4 if negative else 3.8)
    panels = figure.subplots(
        1 + negative, 1, sharex=True, squeeze=False, height_ratios=[2.2, 1][: 1 + negative]
    )[:, 0]
    upper, last = panels[0], panels[-1]
    for record in runs[0]:
        weights = record.effective
        upper.scatter(
            np.full(len(weights), record.iteration), weights,
            s=5, c=np.where(weights < 0, COLOURS[1], COLOURS[0]), alpha=0.5, linewidths=0,
        )  # fmt: skip
    tasks = len(runs[0][0].effective)
    upper.axhline(
        1 / tasks, color="black", linewidth=0.8, linestyle="--", label=f"uniform, 1/{tasks}"
    )
    upper.axhline(0, color="black", linewidth=0.8)
    upper.set_ylabel("weight of each task")
    legend = "; red: negative" if negative else ", none of them negative"
    upper.set_title(f"{rule}: effective weights of the first seed{legend}", fontsize=10)
    upper.legend(frameon=False)
    if negative:
        for run in runs:
            share = [100 * float(np.mean(r.effective < 0)) for r in run]
            last.plot([r.iteration for r in run], _smooth(share), color=COLOURS[1], alpha=0.8)
        last.set_ylabel("negative weights (%)")
        last.set_ylim(0, max(5.0, last.get_ylim()[1]))
    last.set_xlabel("meta-iteration")
    last.set_xlim(0, runs[0][-1].iteration)
    for axes in panels:
        _tidy(axes)
    return _saved(figure, file, 140)


def _smooth(values: list[float]) -> np.ndarray[Any, Any]:
    """A running mean over a twentieth of the run."""
    window = max(1, len(values) // 20)
    padded = np.pad(np.array(values), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def contact_sheet(
    batch: TaskBatch, file: Path, ways: int, names: list[list[str]] | None = None, most: int = 8
) -> Path:
    """Draw episodes as a PNG: a block each, a row a class, support left and queries right.

    Args:
        batch: image episodes, support and queries ordered by label.
        file: the PNG to write.
        ways: classes an episode.
        names: the classes' names, by episode and label.
        most: query columns at the most.
    """
    shots, queries = batch.support_x.shape[1] // ways, batch.query_x.shape[1] // ways
    shown = min(queries, most)
    tasks = len(batch)
    across = min(tasks, 2)
    down = -(-tasks // across)
    figure = _figure(across * (1.5 + 0.55 * (shots + shown)), down * (0.6 + 0.55 * ways))
    for task, place in enumerate(figure.subfigures(down, across, squeeze=False).flat):
        if task >= tasks:
            break
        place.suptitle(f"episode {task + 1}: support | queries", fontsize=9)
        grid = place.subplots(
            ways, shots + shown + 1, squeeze=False, width_ratios=[1] * shots + [0.3] + [1] * shown
        )
        for label in range(ways):
            support = batch.support_x[task, label * shots : (label + 1) * shots]
            query = batch.query_x[task, label * queries : label * queries + shown]
            for column, axes in enumerate(grid[label]):
                axes.set_axis_off()
                if column == shots:
                    continue
                image = support[column] if column < shots else query[column - shots - 1]
                axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            if names is not None:
                grid[label][0].text(
                    -0.1, 0.5, names[task][label], fontsize=6, ha="right", va="center",
                    transform=grid[label][0].transAxes,
                )  # fmt: skip
    return _saved(figure, file, 130)
