"""Join the results of one comparison whose rules and seeds were trained in several parts.

Where the runs of all parts are there, no script is needed: put them into one folder and call `gametalearn compare` on
all rules and seeds. This is for parts of which only results.json and course.json are left. Means, differences, their
intervals over seeds and p-values are computed anew from each seed's values. Of the episodes, the interval of each rule
follows from each seed's; that of a difference does not, and is left out. Of course.json the means are joined, without
intervals; each must be of the very trainings of the results.json beside it.

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
from gametalearn.errors import summary
from gametalearn.files import make_folder, write_json
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
    if len({tuple(found) for found, _ in parts}) > 1:
        raise LookupError("the parts have other entries")
    if "mean" in first:
        mean = sum(found["mean"] * seeds for found, seeds in parts) / sum(n for _, n in parts)
        return {"mean": mean, "ci95": None}
    return {key: averaged([(found[key], seeds) for found, seeds in parts]) for key in first}


def courses(folders: Sequence[Path], parts: Sequence[Found]) -> Found | None:
    """The content of course.json for all parts; None where one has no such file, which is said.

    Raises:
        InputError: a file is damaged, or is not of the trainings of its results.json.
    """
    files = [folder / "course.json" for folder in folders]
    if lacking := [file for file in files if not file.is_file()]:
        if len(lacking) < len(files):
            print(f"join_results: {lacking[0]} is not there, so that no course.json is written",
                  file=sys.stderr)  # fmt: skip
        return None
    score = parts[0]["metric"]["name"]
    found: list[Found] = []
    for file, part in zip(files, parts, strict=True):
        scores = {
            rule: {str(one["seed"]): one[score] for one in entry["seeds"]}
            for rule, entry in part["rules"].items()
        }
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
            own = found[-1].get("scores")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: damaged ({summary(error)})") from error
        if own != scores:
            raise InputError(
                f"{file}: not of the trainings of the results.json beside it; write it anew by read_course.py"
            )
    names = list(dict.fromkeys(rule for part in parts for rule in part["rules"]))
    try:
        rules = {
            rule: averaged([
                (one["rules"][rule], len(one["scores"][rule])) for one in found if rule in one["scores"]
            ])
            for rule in names
        }  # fmt: skip
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{', '.join(map(str, files))}: damaged, or validated at different iterations ({summary(error)})"
        ) from error
    joint: Found = {rule: {} for rule in names}
    for one in found:
        for rule, own in one["scores"].items():
            joint[rule].update(own)
    return {"tasks": found[0]["tasks"], "scores": joint, "rules": rules}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        parts = [read_results(folder) for folder in args.parts]
        if args.out.resolve() in [folder.resolve() for folder in args.parts]:
            raise InputError(
                f"--out {args.out} is one of the parts, which it would replace; name another folder"
            )
        found = joined(parts)
        course = courses(args.parts, parts)
        if course is None and (args.out / "course.json").exists():
            raise InputError(
                f"{args.out / 'course.json'} is of other results, and would stay; remove it, or choose "
                "another --out"
            )
        make_folder(args.out)
        write_json(args.out / "results.json", found, indent=2)
        if course is not None:
            write_json(args.out / "course.json", course)
    except InputError as error:
        print(f"join_results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
