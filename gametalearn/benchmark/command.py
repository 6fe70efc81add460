"""``gametalearn bench``: print the figures, and write them where asked."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from pathlib import Path

from gametalearn.benchmark.figures import FIELDS, LEAST_ROUNDS
from gametalearn.benchmark.processes import in_process
from gametalearn.benchmark.report import plot_sweep, summary, sweep_line, unpublishable
from gametalearn.benchmark.rounds import AXES, Measure, run_bench, sweep, write_json
from gametalearn.benchmark.settings import CONFIGS

__all__ = ["SWEEP_VALUES", "add_options", "run"]

SWEEP_VALUES = {
    "tasks": (1, 2, 4, 8, 16, 32),
    "steps": (1, 2, 3, 5, 10),
    "shots": (1, 2, 5, 10),
    "threads": tuple(n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)),
}


def run(args: argparse.Namespace, measure: Measure = in_process) -> None:
    """Measure as the arguments say."""
    try:
        _run(args, measure)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; no result was written") from None


def _run(args: argparse.Namespace, measure: Measure) -> None:
    common = {
        "rounds": args.rounds,
        "repeats": args.repeats,
        "device": args.device,
        "say": _say,
        "measure": measure,
    }
    changes = {"constant_memory": args.constant_memory}
    if args.sweep is None:
        setting = dataclasses.replace(CONFIGS[args.config], **changes)
        result = run_bench(args.config, args.threads, args.json, setting=setting, **common)
        print(summary(result))
        return
    values = SWEEP_VALUES[args.sweep]
    results = sweep(args.config, args.sweep, values, args.threads, **common, **changes)
    print("\n".join([*map(sweep_line, results), *unpublishable(*results)]))
    if args.json is not None:
        write_json(args.json, results)
        picture = args.json.with_suffix(".png")
        plot_sweep(results, picture)
        print(f"{args.json} and {picture}")


def _say(text: str) -> None:
    print(f"gametalearn: {text}", file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``gametalearn bench``, and the end of its help."""
    add = parser.add_argument
    add("--config", default="omniglot-5w1s", metavar="NAME", choices=CONFIGS,
        help=f"What to time: {', '.join(CONFIGS)}. Default: omniglot-5w1s.")  # fmt: skip
    add("--threads", type=int, metavar="N",
        help="Number of PyTorch threads on every side. Default: PyTorch's choice.")  # fmt: skip
    add("--device", default="cpu", metavar="NAME",
        help="What every side is computed on, cpu or cuda. Default: cpu.")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="Write the result to this file.")
    add("--rounds", type=int, default=LEAST_ROUNDS, metavar="N",
        help=f"Number of processes per side, which take turns. Default: {LEAST_ROUNDS}, the least for "
        "figures to be published.")  # fmt: skip
    add("--repeats", type=int, metavar="N",
        help="Number of timings per process. Default: enough for a steady median.")  # fmt: skip
    add("--sweep", choices=AXES, help="Vary this, and draw a plot beside the JSON file.")
    add("--constant-memory", action="store_true",
        help="Use the setting of that name in gametalearn, for many inner steps.")  # fmt: skip
    parser.epilog = (
        f"{explanation()}\n\nexample:\n"
        "  gametalearn bench --config omniglot-5w1s --threads 2 --json bench.json"
    )


def explanation() -> str:
    """How it is measured and what the fields mean, for ``--help``."""
    paragraphs = [
        "Each side runs in a process of its own: gametalearn, learn2learn with the same allocator "
        "settings, learn2learn as shipped, gametalearn's first order, and the floors of both orders. "
        "They run in turn, one at a time, for several rounds. Each process warms up and then takes "
        "several timings. Run it on an idle machine: what other processes used meanwhile is measured, "
        "and figures that they have disturbed are marked as not to be published.",
        "To check a ratio by hand, time two sides yourself and divide what they print as median_ms; "
        "the other names for --side are those in the table that bench prints:",
    ]
    by_hand = [
        f"  python -m gametalearn.benchmark --side {side} --config omniglot-5w1s --threads 2"
        for side in ("gametalearn", "learn2learn")
    ]
    fields = [
        line for names, meaning in FIELDS for line in (*_wrapped(names, 2), *_wrapped(meaning, 6))
    ]
    method, hand = ("\n".join(_wrapped(p, 0)) for p in paragraphs)
    return "\n".join(
        [method, "", hand, *by_hand, "", "fields of the JSON file:", *fields,
         "", "With --sweep the file is a list of such objects, without the fields about errors, each "
         "with", "axis, the name of what varies, and value, its value."]
    )  # fmt: skip


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        text, 98, initial_indent=space, subsequent_indent=space, break_on_hyphens=False
    )
