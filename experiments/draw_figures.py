"""Draw the figures of this folder's README anew from the files below results/.

``clean.png``, ``contradictory.png``, ``mini-imagenet.png`` and ``learners.png``: each rule's difference from the baseline, as
`gametalearn compare` draws it (results.json). ``gains.png``: what each rule gained one step ahead against its score
after training (gains.json). ``screened.png``: one rule beside the plain mean and trainings on the clean tasks alone
(screened.json, the list that tables.py reads).

example:
  python experiments/draw_figures.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gametalearn import InputError
from gametalearn.canvas import COLOURS, GREY, drawing, entitle, figure, legend_below, saved, tidy
from gametalearn.figures import differences
from gametalearn.probing.found import STEPS
from gametalearn.stored import read_results
from gametalearn.tables import subject
from gametalearn.units import Units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent

DIFFERENCES = {
    "clean": "combining-clean",
    "contradictory": "rules-contradictory",
    "mini-imagenet": "mini-maml",
    "learners": "learners",
}
"""Results by the name of their figure."""

RANKED = {"clean tasks": "combining-clean", "40% contradictory tasks": "rules-contradictory"}

RULES = {"base": "plain mean", "own": "screened-mean", "best": "plain mean, clean tasks alone"}


def ranked(results: Path) -> Figure:
    """Score after training over the gain one step ahead at one length, a panel for each of `RANKED`."""
    drawn = figure(10, 5.6)
    for axes, (title, name) in zip(drawn.subplots(1, len(RANKED)), RANKED.items(), strict=True):
        found = json.loads((results / name / "gains.json").read_text(encoding="utf-8"))
        units = Units.of(read_results(results / name))
        points = sorted(
            (100 * one[found["score"]], 1000 * one["length"], rule)
            for rule, one in found["rules"].items()
        )
        axes.plot(
            [x for _, x, _ in points],
            [y for y, _, _ in points],
            "o",
            color=COLOURS[0],
            markersize=5,
        )
        height, at = points[-1][0] - points[0][0], -math.inf
        right = max(x for _, x, _ in points)
        right += 0.12 * (right - min(x for _, x, _ in points))
        for y, x, rule in points:  # names in a column of their own, none on top of another
            at = max(y, at + 0.038 * height)
            axes.annotate(rule.removeprefix("torchjd:"), (x, y), xytext=(right, at), fontsize=8, va="center",
                          arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": GREY, "linewidth": 0.5})  # fmt: skip
        axes.set_ylim(points[0][0] - 0.04 * height, at + 0.04 * height)
        rho = found["correlations"]["length"]["rho"]
        axes.set_title(f"{title}: rank correlation {rho:+.2f}", fontsize=9)
        axes.set_xlabel(f"gain minus {found['baseline']}'s, 0.001 of the query loss", fontsize=9)
        axes.set_ylabel(f"test {units.heading.replace(' %', ' (%)')}", fontsize=9)
        tidy(axes, "both")
    entitle(drawn, f"one step ahead ({STEPS['length']}), and after training")
    return drawn


def screened(place: Path) -> Figure:
    """A row for each cell of the list, with the scores of the plain mean, the rule and the clean tasks alone."""
    found = [(cell, place.parent / cell["results"], cell["oracle"] and place.parent / cell["oracle"])
             for cell in json.loads(place.read_text(encoding="utf-8"))["cells"]]  # fmt: skip
    drawn = figure(8, 1.5 + 0.55 * len(found))
    axes = drawn.subplots()
    handles: dict[str, Any] = {}
    for row, (_, folder, oracle) in enumerate(found):
        rules = read_results(folder)["rules"]
        shown = [("base", rules["uniform"]), ("own", rules["screened-mean"])]
        if oracle:
            shown.append(("best", read_results(oracle)["rules"]["uniform"]))
        for i, (kind, entry) in enumerate(shown):
            handles[kind] = axes.errorbar(
                100 * entry["accuracy"], row + 0.18 * (i - 1), xerr=100 * entry["ci95"], fmt="os^"[i],
                color=COLOURS[i], capsize=3, markersize=5, label=RULES[kind],
            )  # fmt: skip
    axes.set_yticks(
        range(len(found)), [f"{cell['data']}\n{cell['tasks']}" for cell, *_ in found], fontsize=8
    )
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("test accuracy (%)")
    tidy(axes, "x")
    entitle(
        drawn,
        subject(read_results(found[0][1])["config"]).partition(", ")[2],
        "mean and 95% interval over five seeds",
    )
    legend_below(drawn, list(handles.values()))
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="(default: beside this)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "figures", help="(default: beside this)")
    args = parser.parse_args(argv)
    try:
        with drawing():
            for name, folder in DIFFERENCES.items():
                saved(
                    differences(read_results(args.results / folder)), args.out / f"{name}.png", 140
                )
            saved(ranked(args.results), args.out / "gains.png", 140)
            saved(screened(args.results / "screened.json"), args.out / "screened.png", 140)
    except (InputError, OSError, ValueError, LookupError) as error:
        print(f"draw_figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
