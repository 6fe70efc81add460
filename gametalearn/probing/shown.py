"""A probe as text and as a plot."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from gametalearn.canvas import COLOURS, figure
from gametalearn.probing.found import STEPS, Probe
from gametalearn.statistics import FEWEST, LEVEL, Estimate, over_seeds, verdict
from gametalearn.tables import WIDTH, aligned
from gametalearn.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["gains_figure", "table"]


def table(probe: Probe, title: str) -> str:
    """The tables for the terminal: directions, then the gains of each kind of step."""
    count = len(probe.before["same"])
    before = ", ".join(f"{v.mean():.4g} ({tasks})" for tasks, v in probe.before.items())
    heading = (
        f"{title}: {counted(count, 'meta-batch', 'meta-batches')} of {counted(probe.tasks, 'task')}, "
        f"seed {probe.seed}; mean query loss "
        f"{before}"
    )
    blocks = [*textwrap.wrap(heading, WIDTH), "", *aligned(*_directions(probe))]
    for step in probe.gains:
        unit = _unit(probe, step)
        detail = {
            "length": f", {probe.length:.4g}",
            "plain": f", {probe.rate:.4g}",
        }.get(step, "")
        blocks += ["", f"{STEPS[step]}{detail}: gain in {unit:g} of the query loss"]
        blocks += aligned(*_gains(probe, step, unit))
    return "\n".join([*blocks, "", *textwrap.wrap(_notes(probe), WIDTH)])


def _directions(probe: Probe) -> tuple[list[str], list[list[str]]]:
    kind = "clean " if probe.aim == "clean" else ""
    header = [
        "rule",
        "cosine to uniform",
        f"to the mean of {probe.reference} {kind}tasks",
        "effective tasks",
        "length",
    ]
    lines = []
    for row, rule in enumerate(probe.rules):
        values = (probe.cosine_uniform, probe.cosine_true, probe.effective_tasks)
        found = [over_seeds(value[row]) for value in values]
        shown = [_shown(e, 1, digits) for e, digits in zip(found, (3, 3, 2), strict=True)]
        lines.append([rule, *shown, f"{probe.size[row].mean():.3g}"])
    return header, lines


def _gains(probe: Probe, step: str, unit: float) -> tuple[list[str], list[list[str]]]:
    """A line for each rule: gains on each kind of task, and their differences from the baseline's."""
    aim, p_holm = probe.aim, probe.p_holm(step, probe.aim)
    enough = len(probe.before["same"]) >= FEWEST
    minus = f"{aim}, minus {probe.baseline}"
    header = [
        "rule",
        *probe.before,
        *([f"{minus} [95%]", "p_holm", "verdict"] if enough else [minus]),
    ]
    largest = max(abs(probe.gain(rule, step, aim).mean) for rule in probe.rules)
    digits = _digits(largest / unit)
    others = {r: probe.difference(r, step, aim) for r in probe.rules if r != probe.baseline}
    finer = _digits(max((e.half or abs(e.mean) for e in others.values()), default=0.0) / unit)
    lines = []
    for rule in probe.rules:
        line = [rule, *(_shown(probe.gain(rule, step, t), unit, digits) for t in probe.before)]
        if rule in others:
            found = others[rule]
            line.append(f"{found.mean / unit:+z.{finer}f}")
            if found.ci95 is not None:
                low, high = (f"{value / unit:+z.{finer}f}" for value in found.ci95)
                line[-1] += f" [{low}, {high}]"
            adjusted = p_holm[rule]
            if enough:
                line.append("-" if adjusted is None else f"{adjusted:.2g}")
                line.append(verdict(found.mean, adjusted))
        lines.append(line + [""] * (len(header) - len(line)))
    return header, lines


def _digits(largest: float) -> int:
    """Decimal places that show two digits of the largest of some numbers."""
    return max(0, 1 - math.floor(math.log10(largest))) if largest > 0 else 2


def _unit(probe: Probe, step: str) -> float:
    """The power of a thousandth that matches the size of the gains."""
    largest = max(
        abs(probe.gain(rule, step, tasks).mean) for rule in probe.rules for tasks in probe.before
    )
    power = math.ceil(-math.log10(largest) / 3) if 0 < largest < 1 else 0
    return float(f"1e-{3 * power}")


def _shown(estimate: Estimate, unit: float, digits: int) -> str:
    half = "" if estimate.half is None else f" ± {estimate.half / unit:.{digits}f}"
    return f"{estimate.mean / unit:z.{digits}f}{half}"


def _notes(probe: Probe) -> str:
    """What the numbers mean, and what they do not cover."""
    count = len(probe.before["same"])
    if count < FEWEST:
        return f"For intervals and tests take at least {FEWEST} meta-batches."
    others = len(probe.rules) - 1
    adjusted = f", adjusted for {others} rules (Holm)" if others > 1 else ""
    test = f" p_holm is the p-value of a paired t test{adjusted}; a verdict needs p_holm < {LEVEL}."
    return (
        f"± and [ ] are 95% intervals over the {count} meta-batches, all from the same weights; they "
        f"say nothing about other weights, or about a whole training run.{test if others else ''}"
    )


def gains_figure(probe: Probe, title: str) -> Figure:
    """Each rule's gain minus the baseline's with its interval: a row per step, a column per kind of task."""
    rules = [rule for rule in probe.rules if rule != probe.baseline] or list(probe.rules)
    steps, tasks = list(probe.gains), list(probe.before)
    found = figure(3.2 * len(tasks) + 1.2, (0.9 + 0.3 * len(rules)) * len(steps) + 0.5)
    panels = found.subplots(len(steps), len(tasks), squeeze=False, sharey=True, sharex="row")
    for step, line in zip(steps, panels, strict=True):
        for of, axes in zip(tasks, line, strict=True):
            axes.axvline(0, color="black", linewidth=0.8)
            for row, rule in enumerate(rules):
                alone = rule == probe.baseline
                gain = (probe.gain if alone else probe.difference)(rule, step, of)
                axes.errorbar(gain.mean, row, xerr=gain.half, color=COLOURS[row % len(COLOURS)],
                              fmt="s", capsize=3, markersize=4)  # fmt: skip
            axes.set_title(f"{STEPS[step]}, {of} tasks", fontsize=8)
            axes.set_yticks(range(len(rules)), rules)
            axes.set_ylim(len(rules) - 0.5, -0.5)
            axes.tick_params(labelsize=8)
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", alpha=0.25)
    what = "gain" if rules == [probe.baseline] else f"gain minus that of {probe.baseline}"
    found.suptitle(f"{title}: {what}, with 95% intervals; right is better", fontsize=9)
    return found
