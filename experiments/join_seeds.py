"""Join the results of one comparison that was trained in two parts, on other seeds.

Where the runs of both parts are there, no script is needed: put them into one folder and call `gametalearn compare` on
all seeds. This is for a part of which only results.json and course.json are left. Means, intervals over seeds and
p-values are computed anew from each seed's values. Of the episodes, the interval of each rule follows from each seed's;
that of a difference does not, and is left out. Of course.json the means are joined, without intervals.

example:
  python experiments/join_seeds.py experiments/results/mini-maml runs/mini-maml-more --out runs/mini-maml-joined
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gametalearn import InputError
from gametalearn.files import write_json
from gametalearn.results import adjusted, pair_of
from gametalearn.statistics import over_seeds
from gametalearn.stored import read_results

Found = dict[str, Any]

OWN = ("environment", "rules", "paired")
"""What two parts of a comparison need not share."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", type=Path, nargs=2, metavar="FOLDER",
                        help="two folders with results.json, and course.json if there is one")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the joined files")
    return parser.parse_args(argv)


def joined(a: Found, b: Found) -> Found:
    """The content of results.json for the seeds of both parts.

    Raises:
        InputError: the parts differ in settings, version or rules, share a seed, or have several objectives.
    """
    for key in sorted({*a, *b} - {*OWN}):
        if a.get(key) != b.get(key):
            raise InputError(f"the parts differ in '{key}'; only the seeds may be others")
    if (one := a["environment"]["gametalearn"]) != (two := b["environment"]["gametalearn"]):
        raise InputError(f"the parts were trained by '{one}' and '{two}'; train both by one")
    if a["rules"].keys() != b["rules"].keys():
        raise InputError(
            f"the parts have the rules {', '.join(a['rules'])} and {', '.join(b['rules'])}"
        )
    if any("objectives" in entry for entry in a["rules"].values()) or "single" in a:
        raise InputError("results of several objectives cannot be joined")
    taken = {one["seed"] for one in next(iter(a["rules"].values()))["seeds"]}
    own = {one["seed"] for one in next(iter(b["rules"].values()))["seeds"]}
    if shared := sorted(taken & own):
        raise InputError(f"both parts have the seeds {', '.join(map(str, shared))}")
    score, higher = a["metric"]["name"], a["metric"]["higher_is_better"]
    rules = {}
    for rule, entry in a["rules"].items():
        seeds = [*entry["seeds"], *b["rules"][rule]["seeds"]]
        over = over_seeds([one[score] for one in seeds])
        widths = [one["ci95_episodes"] for one in seeds]
        within = None if None in widths else float(np.linalg.norm(widths)) / len(seeds)
        rules[rule] = {score: over.mean, "ci95": over.half, "ci95_episodes": within, "seeds": seeds}
    unknown = {"ci95": None, "p_value": None}
    pairs = [
        pair_of(one["rule"], one["baseline"], [*one["by_seed"], *two["by_seed"]], higher, unknown)
        for one, two in zip(a["paired"], b["paired"], strict=True)
    ]
    commands = [part["environment"]["command"] for part in (a, b)]
    return {
        **a,
        "environment": {**b["environment"], "command": "; ".join(filter(None, commands))},
        "rules": rules,
        "paired": adjusted(pairs, a.get("primary", ())),
    }


def averaged(parts: Sequence[tuple[Any, int]]) -> Any:
    """The means of course.json over the seeds of all parts, each given with how many it has."""
    first = parts[0][0]
    if "mean" in first:
        mean = sum(found["mean"] * seeds for found, seeds in parts) / sum(n for _, n in parts)
        return {"mean": mean, "ci95": None}
    return {key: averaged([(found[key], seeds) for found, seeds in parts]) for key in first}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        parts = [read_results(folder) for folder in args.parts]
        found = joined(*parts)
    except InputError as error:
        print(f"join_seeds: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", found, indent=2)
    courses = [folder / "course.json" for folder in args.parts]
    if all(file.is_file() for file in courses):
        read = [json.loads(file.read_text(encoding="utf-8")) for file in courses]
        seeds = [len(next(iter(part["rules"].values()))["seeds"]) for part in parts]
        rules = [(one["rules"], many) for one, many in zip(read, seeds, strict=True)]
        write_json(args.out / "course.json", {**read[0], "rules": averaged(rules)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
