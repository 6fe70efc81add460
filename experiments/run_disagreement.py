"""Compare weighting rules where a share of the training tasks disagrees with the others.

One `gametalearn compare` for each cell of the grid optimiser x meta-batch x kind x share, in its own
folder below --out; what is finished there is not run again, so the script can be interrupted, and
called again with more cells, or more rules in a cell. It writes, over all calls with the same settings,

- ``table.md``: test accuracy of every rule in every cell, its paired difference from uniform with a
  95% interval and p-value over seeds (from three seeds on), and what the rule did: mean weight (times T,
  so that uniform has 1) and share of negative weights of clean and of corrupted tasks; and how the
  tasks' gradients differ: their mean lengths, and mean cosines between clean tasks, between clean and
  corrupted ones, between corrupted ones;
- ``summary.md``: a line for each cell: the baseline's accuracy, each other rule's paired difference
  from it with its 95% interval over seeds, and on how many of the seeds the rule is ahead;
- ``disagreement.json``: the same as data;
- ``disagreement.png``: accuracy over the share, a panel for each kind, optimiser and meta-batch;
- ``weights.png``: the mean weights of clean and corrupted tasks over the share.

example:
  python experiments/run_disagreement.py --out runs/disagreement --jobs 2 --threads 1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.lines import Line2D

from gametalearn import InputError, TrainConfig, compare, keep_memory
from gametalearn.canvas import COLOURS, entitle, figure, legend_below, saved, tidy
from gametalearn.disagreement import Kind
from gametalearn.errors import require_whole
from gametalearn.files import replacing
from gametalearn.jobs import place_of
from gametalearn.settings import read_toml
from gametalearn.statistics import FEWEST
from gametalearn.tables import subject
from gametalearn.words import counted

HERE = Path(__file__).parent
RULES = "uniform,agreement,agreement-update,agreement-cosine,norm-control"
KINDS = "shuffled,permuted,contradictory"

Cell = dict[str, Any]

SCHEMA = "gametalearn.disagreement/2"
"""Since 2 a paired difference has its interval over seeds; before, it was over test episodes."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "disagreement.toml",
                        help="settings that all cells share (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and results")
    for name, default, text in (
        ("rules", RULES, "weighting rules"),
        ("kinds", KINDS, f"kinds of disagreement, of {', '.join(get_args(Kind))}"),
        ("shares", "0,0.1,0.2,0.4", "shares of corrupted tasks; 0 is run once for all kinds"),
        ("optimizers", "adam,sgd", "meta-optimisers"),
        ("meta-batches", "4,16", "tasks in a meta-update"),
    ):
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--episodes", type=int, default=600, help="test episodes per seed (600)")
    parser.add_argument("--iterations", type=int, help="meta-updates (default: the config's)")
    parser.add_argument("--adam-lr", type=float, help="Adam's meta rate (default: the config's)")
    parser.add_argument("--sgd-lr", type=float, default=1.0, help="SGD's (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default 1)")
    return parser.parse_args(argv)


def grid(args: argparse.Namespace) -> list[Cell]:
    """The cells in the order in which they run: the smallest shares first."""
    for name in ("seeds", "episodes", "jobs"):
        require_whole(f"--{name}", getattr(args, name), 1)
    try:
        shares = sorted(float(s) for s in args.shares.split(","))
        batches = [int(tasks) for tasks in args.meta_batches.split(",")]
    except ValueError as error:
        raise InputError(f"--shares and --meta-batches take numbers ({error})") from None
    kinds = args.kinds.split(",")
    cells = [
        {
            "optimizer": optimizer,
            "meta_batch": tasks,
            "kind": "none" if share == 0 else kind,
            "share": share,
        }
        for share in shares
        for optimizer in args.optimizers.split(",")
        for tasks in batches
        for kind in (kinds if share else kinds[:1])
    ]
    for cell in cells:  # a mistake in the last one is better known before the first has run
        settings(args, cell)
    return cells


def key(cell: Cell) -> tuple[str, int, str, float]:
    return cell["optimizer"], cell["meta_batch"], cell["kind"], cell["share"]


def order(cell: Cell) -> tuple[str, int, int, float]:
    """A place in the table: a kind's cells together, those without spoiled tasks first."""
    kind = ["none", *get_args(Kind)].index(cell["kind"])
    return cell["optimizer"], cell["meta_batch"], kind, cell["share"]


def earlier(out: Path, common: dict[str, Any]) -> dict[tuple[str, int, str, float], Cell]:
    """The cells of earlier calls, if those had the same settings in common."""
    file = out / "disagreement.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    if content and (content.get("common"), content.get("schema")) != (common, SCHEMA):
        print(
            f"{file}: written with other settings; what this call finds replaces it",
            file=sys.stderr,
        )
        return {}
    return {key(cell): cell for cell in content.get("cells", [])}


def settings(args: argparse.Namespace, cell: Cell) -> TrainConfig:
    given = {k.replace("-", "_"): v for k, v in read_toml(args.config).items()}
    rate = args.sgd_lr if cell["optimizer"] == "sgd" else args.adam_lr
    changes = {
        "iterations": args.iterations,
        "meta_lr": rate,
        "meta_batch": cell["meta_batch"],
        "meta_optimizer": cell["optimizer"],
        "disagree": cell["share"],
        "disagree_kind": None if cell["kind"] == "none" else cell["kind"],
        "threads": args.threads,
        "log_matrices": True,
    }
    return TrainConfig.of(**{**given, **{k: v for k, v in changes.items() if v is not None}})


def measure(
    place: Path, config: TrainConfig, rules: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Run what is missing of one cell; its results by rule."""
    done = compare(config, rules, args.seeds, args.episodes, place, jobs=args.jobs).as_dict()
    pairs = {pair["rule"]: pair for pair in done["paired"]}
    found = {}
    for rule, entry in done["rules"].items():
        keys = ("difference", "ci95", "p_value")
        found[rule] = {
            **{key: entry[key] for key in ("accuracy", "ci95", "ci95_episodes")},
            "by_seed": [one["accuracy"] for one in entry["seeds"]],
            "paired": {key: pairs[rule][key] for key in keys} if rule in pairs else None,
            "tasks": tasks_of([place_of(place, rule, one["seed"]) for one in entry["seeds"]]),
        }
    return found


def tasks_of(runs: list[Path]) -> dict[str, float | None]:
    """Weights, lengths and cosines of clean and spoiled tasks, means over the logged iterations."""
    columns: dict[str, list[float]] = {}

    def add(name: str, values: Any) -> None:
        columns.setdefault(name, []).extend(np.ravel(values).tolist())

    for run in runs:
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            weight = np.array(record["effective"])
            spoiled = np.array(record.get("spoiled", [False] * len(weight)), dtype=bool)
            norms, cosine = (np.array(record["diagnostics"][k]) for k in ("norms", "cosine"))
            different = ~np.eye(len(weight), dtype=bool)
            for name, of in (("clean", ~spoiled), ("spoiled", spoiled)):
                add(f"weight_{name}", weight[of] * len(weight))
                add(f"negative_{name}", weight[of] < 0)
                add(f"norm_{name}", norms[of])
                add(f"cosine_{name}", cosine[np.outer(of, of) & different])
            add("cosine_between", cosine[np.outer(~spoiled, spoiled)])
    return {name: float(np.mean(v)) if v else None for name, v in columns.items()}


HEADER = (
    "optimiser", "tasks", "kind", "share", "rule", "accuracy (%), ± over episodes", "± over seeds",
    "minus uniform [95% over seeds]", "p", "weight x T, clean / corrupted", "negative (%), clean / corrupted",
    "length, clean / corrupted", "cosine, clean / between / corrupted",
)  # fmt: skip


def percent(paired: dict[str, Any]) -> str:
    """A paired difference and its interval, if it has one, in points of accuracy."""
    interval = ""
    if paired["ci95"] is not None:
        low, high = (100 * v for v in paired["ci95"])
        interval = f" [{low:+z.2f}, {high:+z.2f}]"
    return f"{100 * paired['difference']:+z.2f}{interval}"


def over_seeds(entry: dict[str, Any]) -> str:
    """Half width of a mean's interval over seeds, in points, if it has one."""
    return "" if entry["ci95"] is None else f" ± {100 * entry['ci95']:.2f}"


def summary(cells: list[Cell], rules: Sequence[str]) -> str:
    """Differences from the baseline, the first rule, as a Markdown table with a line a cell."""
    baseline, *others = rules
    header = ["optimiser", "tasks", "kind", "share", f"{baseline} (%)", *others]
    lines: list[Sequence[str]] = [header, ["---"] * len(header)]
    for cell in cells:
        base = cell["rules"][baseline]
        line = [
            cell["optimizer"],
            str(cell["meta_batch"]),
            cell["kind"],
            f"{cell['share']:g}",
            f"{100 * base['accuracy']:.2f}{over_seeds(base)}",
        ]
        for rule in others:
            r = cell["rules"].get(rule)
            if r is None:
                line.append("")
                continue
            ahead = sum(a > b for a, b in zip(r["by_seed"], base["by_seed"], strict=True))
            line.append(f"{percent(r['paired'])}, {ahead}/{len(r['by_seed'])}")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(cells: list[Cell]) -> str:
    """Everything as a Markdown table, a line for each cell and rule."""
    lines: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER)]
    for cell in cells:
        for rule, r in cell["rules"].items():
            tasks = r["tasks"]

            def show(*names: str, scale: float = 1, digits: int = 2, of: Any = tasks) -> str:
                values = [of[name] for name in names]
                return " / ".join("-" if v is None else f"{scale * v:.{digits}f}" for v in values)

            paired = r["paired"]
            lines.append([
                cell["optimizer"],
                str(cell["meta_batch"]),
                cell["kind"],
                f"{cell['share']:g}",
                rule,
                f"{100 * r['accuracy']:.2f} ± {100 * r['ci95_episodes']:.2f}",
                over_seeds(r).removeprefix(" ± "),
                percent(paired) if paired else "",
                f"{paired['p_value']:.2g}" if paired and paired["p_value"] is not None else "",
                show("weight_clean", "weight_spoiled"),
                show("negative_clean", "negative_spoiled", scale=100, digits=1),
                show("norm_clean", "norm_spoiled", digits=3),
                show("cosine_clean", "cosine_between", "cosine_spoiled", digits=3),
            ])  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def panels(cells: list[Cell]) -> dict[tuple[str, str, int], list[Cell]]:
    """The cells of each (kind, optimiser, tasks) by share; those of share 0 belong to all kinds."""
    found: dict[tuple[str, str, int], list[Cell]] = {}
    kinds = dict.fromkeys(c["kind"] for c in cells if c["share"]) or {"none": None}
    for kind in kinds:
        for cell in cells:
            if cell["kind"] in (kind, "none"):
                found.setdefault((kind, cell["optimizer"], cell["meta_batch"]), []).append(cell)
    return {
        key: sorted(own, key=lambda c: float(c["share"]))
        for key, own in found.items()
        if key[0] in {c["kind"] for c in own}
    }


def plot(cells: list[Cell], rules: list[str], out: Path, about: str) -> None:
    """``disagreement.png`` and ``weights.png``; a line goes through the cells that have its rule."""
    found = panels(cells)
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    seeds = len(cells[0]["rules"][rules[0]]["by_seed"])
    notes = {
        "disagreement": "mean over seeds" + ", with 95% intervals" * (seeds >= FEWEST),
        "weights": "solid and full: clean tasks, dashed and empty: corrupted ones",
    }
    for name, label in (("disagreement", "test accuracy (%)"), ("weights", "mean weight x T")):
        drawn = figure(3.3 * columns, 2.7 * rows + 0.9)
        grid = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(found) :]:
            axes.remove()
        for axes, ((kind, optimizer, tasks), own) in zip(grid.flat, found.items(), strict=False):
            for i, rule in enumerate(rules):
                with_rule = [c for c in own if rule in c["rules"]]
                if with_rule:
                    curve = accuracies if name == "disagreement" else mean_weights
                    curve(axes, with_rule, rule, i, 0.5 * (i - len(rules) / 2))
            axes.set_title(f"{kind}, {optimizer}, {tasks} tasks", fontsize=9)
            axes.tick_params(labelbottom=True, labelleft=True, labelsize=8)
            axes.set_xlabel("corrupted tasks (%)", fontsize=8)
            axes.set_ylabel(label, fontsize=8)
            tidy(axes, "both")
        entitle(drawn, about, notes[name])
        legend_below(drawn, [Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o",
                             markersize=3, label=rule) for i, rule in enumerate(rules)])  # fmt: skip
        saved(drawn, out / f"{name}.png", 140)


def accuracies(axes: Any, cells: list[Cell], rule: str, number: int, shift: float) -> None:
    """A rule's test accuracy over the share, moved aside a little so that intervals can be told apart."""
    results = [c["rules"][rule] for c in cells]
    axes.errorbar(
        [100 * c["share"] + shift for c in cells], [100 * r["accuracy"] for r in results],
        [100 * (r["ci95"] or 0) for r in results], color=COLOURS[number % len(COLOURS)],
        capsize=2, marker="o", markersize=3, linewidth=1.2,
    )  # fmt: skip


def mean_weights(axes: Any, cells: list[Cell], rule: str, number: int, _shift: float) -> None:
    """A rule's mean weights of clean and of spoiled tasks over the share."""
    axes.axhline(0, color="black", linewidth=0.8)
    colour = COLOURS[number % len(COLOURS)]
    for of, style, face in (("clean", "-", colour), ("spoiled", "--", "white")):
        pairs = [(100 * c["share"], c["rules"][rule]["tasks"][f"weight_{of}"]) for c in cells]
        known = [pair for pair in pairs if pair[1] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), style, color=colour, marker="o", markersize=3,
                      markerfacecolor=face)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    keep_memory()
    rules = args.rules.split(",")
    common: dict[str, Any] = {
        "baseline": rules[0],
        **{k: getattr(args, k) for k in ("seeds", "episodes", "iterations", "adam_lr", "sgd_lr")},
    }
    try:
        cells = grid(args)
        common["config"] = read_toml(args.config)
        done = earlier(args.out, common)
        for number, cell in enumerate(cells, 1):
            name = f"{cell['optimizer']}-{cell['meta_batch']}-{cell['kind']}-{cell['share']:g}"
            print(f"cell {number} of {len(cells)}: {name}", file=sys.stderr, flush=True)
            found = measure(args.out / name, settings(args, cell), rules, args)
            before = done.get(key(cell), {}).get("rules", {})
            done[key(cell)] = {**cell, "rules": {**before, **found}}
            done = dict(sorted(done.items(), key=lambda item: order(item[1])))
            with replacing(args.out / "disagreement.json") as stream:
                content = {
                    "schema": SCHEMA,
                    "common": common,
                    "cells": list(done.values()),
                }
                stream.write(json.dumps(content, indent=1, allow_nan=False).encode())
            names = {r for c in done.values() for r in c["rules"]} - {rules[0]}
            known = [rules[0], *(r for r in RULES.split(",") if r in names)]  # keeps its colour
            known += sorted(names.difference(known))
            for file, text in (
                ("table.md", table(list(done.values()))),
                ("summary.md", summary(list(done.values()), known)),
            ):
                with replacing(args.out / file) as stream:
                    stream.write(text.encode())
            about = f"{subject(settings(args, cell).as_dict())}, {counted(args.seeds, 'seed')}"
            plot(list(done.values()), known, args.out, about)
    except InputError as error:
        print(f"run_disagreement: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run_disagreement: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    print(table(list(done.values())))
    print(summary(list(done.values()), known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
