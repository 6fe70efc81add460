"""Draw how trained sinusoid runs adapt to one curve, step by step, and their error over the steps.

A panel for each run: the curve, the K points that it is given, and the prediction before and after
some inner steps. The last panel: the mean squared error over unseen tasks after 0, 1, 2, ... steps.

example:
  python experiments/plot_sinusoid.py runs/maml runs/agreement --out sinusoid.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gametalearn import InputError, Sinusoid, adapt, evaluate, load_run
from gametalearn.build import stream_seed
from gametalearn.canvas import COLOURS, entitle, figure, legend_below, saved, tidy
from gametalearn.run import Run
from gametalearn.tables import subject


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="what train wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--steps", default="0,1,10", help="drawn steps (default %(default)s)")
    parser.add_argument("--most", type=int, help="steps of the last panel (default: the largest)")
    parser.add_argument("--half", action="store_true", help="give points of the right half only")
    parser.add_argument("--seed", type=int, default=0, help="of the curve (default 0)")
    parser.add_argument("--tasks", type=int, default=600, help="of the last panel (default 600)")
    return parser.parse_args(argv)


def one_curve(shots: int, seed: int, half: bool) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Points given of one task ``(K, 1)``, and the curve ``x -> y``."""
    dense = Sinusoid(shots=400, queries=1, seed=seed).sample(1)
    x, y = dense.support_x[0], dense.support_y[0]
    order = x.flatten().argsort()
    kept = (x.flatten() > 0).nonzero().flatten() if half else torch.arange(len(x))
    return x[kept[:shots]], y[kept[:shots]], (x[order], y[order])


def errors(run: Run, most: int, tasks: int) -> list[float]:
    """The mean squared error after 0 to ``most`` steps, on the test tasks of `evaluate`'s command."""
    source = Sinusoid(shots=run.config.shots, queries=run.config.queries)
    seed = stream_seed(run.config.seed, "test")
    found = []
    for steps in range(most + 1):
        learner = run.learner.for_test(steps)
        found.append(evaluate(run.model, source, learner, tasks, seed, meta=run.meta).mean)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.out.suffix != ".png":
            raise InputError(f"--out {args.out}: a PNG is drawn; let it end in .png")
        try:
            wanted = [int(s) for s in args.steps.split(",")]
        except ValueError:
            raise InputError(f"--steps takes numbers such as 0,1,10; got '{args.steps}'") from None
        runs = [load_run(folder) for folder in args.runs]
        for run in runs:
            if run.config.dataset != "sinusoid":
                raise InputError(f"{run.out}: a run of {run.config.dataset}, not of sinusoid")
        most = args.most or max(wanted)
        drawn = figure(4 * (len(runs) + 1), 4.2)
        *panels, last = drawn.subplots(1, len(runs) + 1)
        for number, (run, axes) in enumerate(zip(runs, panels, strict=True)):
            x, y, (grid, truth) = one_curve(run.config.shots, args.seed, args.half)
            axes.plot(grid, truth, color="black", linewidth=1, label="truth")
            axes.plot(x, y, "^", color="black", markersize=6, label=f"{len(x)} points")
            for i, steps in enumerate(wanted):
                model = adapt(run.model, x, y, run.learner.for_test(steps), meta=run.meta)
                with torch.no_grad():
                    axes.plot(grid, model(grid), color=COLOURS[i], linestyle="--" if i else ":",
                              label="1 step" if steps == 1 else f"{steps} steps")  # fmt: skip
            name = f"{run.config.learner}, {run.config.rule}"
            axes.set_title(f"{name}, seed {run.config.seed}", fontsize=10)
            axes.set_xlabel("x")
            axes.set_ylabel("y")
            handles = axes.get_legend_handles_labels()[0]
            curve = errors(run, most, args.tasks)
            last.plot(range(most + 1), curve, color=COLOURS[number % len(COLOURS)], marker="o",
                      markersize=3, label=name)  # fmt: skip
            print(f"{run.out}: mean squared error {curve[-1]:.4f} after {most} steps")
        last.set_yscale("log")
        last.set_ylabel("mean squared error")
        last.set_xlabel("inner steps")
        last.set_title(f"error over {args.tasks} unseen tasks", fontsize=10)
        last.legend(frameon=False, fontsize=8)
        for axes in (*panels, last):
            tidy(axes, "both")
        entitle(drawn, subject({**runs[0].config.as_dict(), "ways": None}))
        legend_below(drawn, handles)
        saved(drawn, args.out, 140)
    except InputError as error:
        print(f"plot_sinusoid: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
