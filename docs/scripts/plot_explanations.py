"""Draw the explanations' pictures: python docs/scripts/plot_explanations.py docs/figures

``weighting.png``: four task gradients in the plane, and the update that each rule makes of them.
``own_length.png``: the weight of a task over the length of its own gradient.
``intervals.png``: simulated comparisons of two rules that do not differ, with both kinds of interval.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gametalearn import TaskGradients, agreement_weights, make_rule
from gametalearn.canvas import COLOURS, figure
from gametalearn.statistics import Estimate, over_episodes, over_seeds

__all__ = ["intervals", "main", "own_length", "weighting"]

RULES = ("uniform", "agreement", "agreement-cosine", "norm-control")
TASKS = torch.tensor([[1.0, 0.25], [0.85, -0.2], [0.9, 0.55], [-0.9, 2.4]])
"""Three tasks that roughly agree, and one whose gradient is long and points elsewhere."""

SEEDS, EPISODES, COMPARISONS = 5, 300, 40
EPISODE_SPREAD = 0.10
"""Standard deviation of a paired difference between two episodes' accuracies."""


def weights_of(rule: str, rows: Tensor) -> Tensor:
    """A rule's weights ``(T,)`` of gradients ``(T, P)``."""
    none = rows.new_zeros(len(rows))
    gradients = TaskGradients(rows, rows, none, none, torch.zeros(len(rows), dtype=torch.int64))
    return make_rule(rule)(gradients).effective


def weighting() -> Figure:
    """The update of each rule in the plane."""
    found = figure(8, 2.5)
    for axes, rule in zip(found.subplots(1, 4, sharex=True, sharey=True), RULES, strict=True):
        weights = weights_of(rule, TASKS)
        for (x, y), weight in zip(TASKS.tolist(), weights.tolist(), strict=True):
            _arrow(axes, x, y, "#999999", 1.2)
            axes.text(x, y, f" {weight:.2f}", fontsize=8, va="center")
        across, up = (weights @ TASKS).tolist()
        _arrow(axes, across, up, COLOURS[1], 2.5)
        axes.set_title(rule, fontsize=10)
        axes.set_aspect("equal")
        axes.set_xlim(-1.3, 1.7)
        axes.set_ylim(-0.6, 2.7)
        axes.set_xticks([])
        axes.set_yticks([])
    found.supxlabel("grey: task gradients with their weights; red: the update", fontsize=9)
    return found


def _arrow(axes: Any, x: float, y: float, colour: str, width: float) -> None:
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, y), (0, 0), arrowprops=arrow)


def own_length() -> Figure:
    """The weight of a task that is orthogonal to three others, over the length of its gradient."""
    lengths = torch.logspace(-1, 1, 60)
    others = torch.tensor([[1.0, 0.2, 0.0], [1.0, -0.2, 0.0], [1.0, 0.0, 0.0]])
    found = figure(5.6, 3)
    axes = found.subplots()
    for number, normalize in enumerate((False, True)):
        values = [
            float(agreement_weights(torch.cat([others, torch.tensor([[0.0, 0.0, length]])]),
                                    normalize=normalize)[3])
            for length in lengths.tolist()
        ]  # fmt: skip
        name = "agreement-cosine" if normalize else "agreement"
        axes.plot(lengths, values, color=COLOURS[2 - number], label=name)
    axes.axhline(0.25, color="black", linewidth=0.8, linestyle="--", label="uniform")
    axes.set_xscale("log")
    axes.set_xlabel("length of its gradient (the others have 1)")
    axes.set_ylabel("weight of the task")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return found


def simulated(random: np.random.Generator) -> tuple[Estimate, Estimate]:
    """A comparison without an effect: what is said over its seeds, and over its episodes."""
    measurement = EPISODE_SPREAD / EPISODES**0.5
    of_seed = random.normal(0, 3 * measurement, SEEDS)
    values = of_seed[:, None] + random.normal(0, EPISODE_SPREAD, (SEEDS, EPISODES))
    strata = np.repeat(np.arange(SEEDS), EPISODES)
    return over_seeds(values.mean(1)), over_episodes(values.ravel(), strata)


def intervals() -> Figure:
    """Which of the simulated intervals miss zero."""
    random = np.random.default_rng(0)
    pairs = [simulated(random) for _ in range(COMPARISONS)]
    found = figure(8, 3)
    panels = found.subplots(1, 2, sharey=True)
    for axes, estimates, name in zip(
        panels, zip(*pairs, strict=True), ("seeds", "episodes"), strict=True
    ):
        missed = 0
        for x, estimate in enumerate(estimates):
            low, high = estimate.ci95 or (0.0, 0.0)
            miss = low > 0 or high < 0
            missed += miss
            axes.plot([x, x], [100 * low, 100 * high], color=COLOURS[int(miss)], linewidth=1.6)
            axes.plot(x, 100 * estimate.mean, ".", color=COLOURS[int(miss)], markersize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(
            f"95% intervals over {name}: {missed} of {COMPARISONS} miss zero", fontsize=10
        )
        axes.set_xlabel("simulated comparison without an effect")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("difference (points)")
    return found


def main(argv: list[str]) -> int:
    """Draw all of them into a folder."""
    folder = Path(argv[1])
    for draw in (weighting, own_length, intervals):
        draw().savefig(folder / f"{draw.__name__}.png", dpi=140)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
