"""Join the results of one comparison whose rules and seeds were trained in several parts.

Where the runs of all parts are there, no script is needed: put them into one folder and call `gametalearn compare` on
all rules and seeds. This is for parts of which only results.json and course.json are left. Means, differences, their
intervals over seeds and p-values are computed anew from each seed's values. Of the episodes, the interval of each rule
follows from each seed's; that of a difference does not, and is left out. Of course.json the means are joined, without
intervals.

example:
  python experiments/join_results.py experiments/results/mini-maml runs/mini-maml-more --out runs/mini-maml-joined
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

OWN = {"environment", "rules", "paired"}
"""What the parts of a comparison need not share."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", type=Path, nargs="+", metavar="FOLDER",
                        help="folders with results.json, and course.json if there is one")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the joined files")
    return parser.parse_args(argv)


def joined(parts: Sequence[Found]) -> Found:
    """The content of results.json for the rules and seeds of all parts.

    Raises:
        InputError: the parts differ in settings or version, have several objectives, hold a training twice, or lack
            one of a rule on some seed.
    """
    first = parts[0]
    for part in parts:
        for key in sorted({*first, *part} - OWN):
            if first.get(key) != part.get(key):
                raise InputError(f"the parts differ in '{key}'; only rules and seeds may be others")
        one, two = (found["environment"]["gametalearn"] for found in (first, part))
        if one != two:
            raise InputError(f"the parts were trained by '{one}' and '{two}'; train all by one")
        if any("objectives" in entry for entry in part["rules"].values()):
            raise InputError("results of several objectives cannot be joined")
    score, higher = first["metric"]["name"], first["metric"]["higher_is_better"]
    rules = trainings(parts)
    values = {rule: [one[score] for one in seeds] for rule, seeds in rules.items()}
    baseline = "uniform" if "uniform" in rules else next(iter(rules))
    unknown = {"ci95": None, "p_value": None}
    pairs = [
        pair_of(rule, baseline, np.subtract(own, values[baseline]).tolist(), higher, unknown)
        for rule, own in values.items()
        if rule != baseline
    ]
    commands = [part["environment"]["command"] for part in parts]
    return {
        **first,
        "environment": {**first["environment"], "command": "; ".join(filter(None, commands))},
        "rules": {rule: entry(score, seeds) for rule, seeds in rules.items()},
        "paired": adjusted(pairs, first.get("primary", ())),
    }


def trainings(parts: Sequence[Found]) -> dict[str, list[Found]]:
    """Each rule's trainings in the order of their seeds."""
    rules: dict[str, list[Found]] = {}
    for part in parts:
        for rule, found in part["rules"].items():
            rules.setdefault(rule, []).extend(found["seeds"])
    seeds = sorted({one["seed"] for own in rules.values() for one in own})
    for rule, own in rules.items():
        own.sort(key=lambda one: one["seed"])
        there = [one["seed"] for one in own]
        if twice := sorted({seed for seed in there if there.count(seed) > 1}):
            raise InputError(f"'{rule}' is in several parts on the seeds {listed(twice)}")
        if missing := [seed for seed in seeds if seed not in there]:
            raise InputError(f"'{rule}' has no training on the seeds {listed(missing)}")
    return rules


def listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def entry(score: str, seeds: list[Found]) -> Found:
    """What results.json tells of a rule."""
    over = over_seeds([one[score] for one in seeds])
    widths = [one["ci95_episodes"] for one in seeds]
    within = None if None in widths else float(np.linalg.norm(widths)) / len(widths)
    return {score: over.mean, "ci95": over.half, "ci95_episodes": within, "seeds": seeds}


def averaged(parts: Sequence[tuple[Any, int]]) -> Any:
    """The means of a rule in course.json over the seeds of all parts, each given with how many it has."""
    first = parts[0][0]
    if "mean" in first:
        mean = sum(found["mean"] * seeds for found, seeds in parts) / sum(n for _, n in parts)
        return {"mean": mean, "ci95": None}
    return {key: averaged([(found[key], seeds) for found, seeds in parts]) for key in first}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        parts = [read_results(folder) for folder in args.parts]
        if args.out.resolve() in [folder.resolve() for folder in args.parts]:
            raise InputError(
                f"--out {args.out} is one of the parts, which it would replace; name another folder"
            )
        found = joined(parts)
    except InputError as error:
        print(f"join_results: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", found, indent=2)
    files = [folder / "course.json" for folder in args.parts]
    if all(file.is_file() for file in files):
        courses = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        rules = {
            rule: averaged([
                (course["rules"][rule], len(part["rules"][rule]["seeds"]))
                for course, part in zip(courses, parts, strict=True) if rule in part["rules"]
            ])
            for rule in found["rules"]
        }  # fmt: skip
        write_json(args.out / "course.json", {**courses[0], "rules": rules})
    return 0


if __name__ == "__main__":
    sys.exit(main())
