"""Read off the runs of a comparison how their trainings went, and how far each rule departed from the mean.

For each rule: the validated score on the way, the cosine between its update and the mean gradient, its length
relative to the mean's, the effective number of tasks, the share of negative weights, the share of the weight that
corrupted tasks had, that of each of several objectives in the last tenth of the training, and the time that the
gradients and the rule took. What a run logged is averaged over its iterations, then over seeds, with a 95% interval.
It is written as course.json, with the score of each training that it is about; tables.py makes a table from it.

example:
  python experiments/read_course.py runs/rules-clean --out experiments/results/rules-clean
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gametalearn import InputError, read_metrics
from gametalearn.files import make_folder, write_json
from gametalearn.jobs import place_of
from gametalearn.statistics import over_seeds
from gametalearn.stored import read_results

Found = dict[str, Any]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what compare --out wrote, runs included")
    parser.add_argument("--out", type=Path, help="folder of course.json (default: the same)")
    return parser.parse_args(argv)


def corrupted(run: Path) -> float | None:
    """The share of the absolute weights that corrupted tasks had, on average; None if there were none."""
    shares = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if any(record.get("spoiled", ())):
            size = np.abs(np.array(record["effective"]))
            shares.append(size[np.array(record["spoiled"], dtype=bool)].sum() / size.sum())
    return float(np.mean(shares)) if shares else None


def shares(logged: dict[str, Any]) -> Found:
    """Each objective's share of the weight in the last tenth of the training, where all always have tasks."""
    own = {
        name.split("/")[1]: np.abs(values[-max(1, len(values) // 10) :]).mean()
        for name, values in logged.items()
        if name.startswith("objectives/") and name.endswith("/effective")
    }
    if len(own) < 2 or not np.isfinite(list(own.values())).all():
        return {}
    return {f"share/{name}": float(value / sum(own.values())) for name, value in own.items()}


def of_run(run: Path, score: str) -> Found:
    """Averages over the logged iterations of one run, and its validated scores."""
    logged = read_metrics(run)
    there = np.isfinite(validated := logged[f"validation/{score}"])
    numbers = {
        "cosine": logged["diagnostics/update_cosine"].mean(),
        "length": np.median(logged["diagnostics/update_norm"] / logged["diagnostics/mean_norm"]),
        "effective_tasks": logged["diagnostics/effective_tasks"].mean(),
        "negative_share": logged["diagnostics/negative_share"].mean(),
        "gradients_seconds": np.median(logged["seconds/gradients"]),
        "rule_seconds": np.median(logged["seconds/update"]),
    }
    found: Found = {name: float(value) for name, value in numbers.items()}
    if (share := corrupted(run)) is not None:
        found["corrupted_weight"] = share
    found |= shares(logged)
    curve = zip(logged["iteration"][there], validated[there], strict=True)
    return {**found, "validation": {int(at): float(value) for at, value in curve}}


def course(folder: Path) -> Found:
    """Each rule's averages over the seeds of a comparison, with their 95% intervals.

    Raises:
        InputError: no results, or runs that are not there or were validated at other iterations.
    """
    results = read_results(folder)
    score = results["metric"]["name"]
    rules: Found = {}
    for rule, entry in results["rules"].items():
        runs = [of_run(place_of(folder, rule, one["seed"]), score) for one in entry["seeds"]]
        curves = [run.pop("validation") for run in runs]
        if len({tuple(curve) for curve in curves}) > 1:
            raise InputError(
                f"{folder}: the seeds of {rule} were validated at different iterations"
            )
        rules[rule] = {"validation": {}}
        for at in curves[0]:
            rules[rule]["validation"][str(at)] = summary([curve[at] for curve in curves])
        for name in runs[0]:
            rules[rule][name] = summary([run[name] for run in runs])
    scores = {
        rule: {str(one["seed"]): one[score] for one in entry["seeds"]}
        for rule, entry in results["rules"].items()
    }
    return {"tasks": results["meta_batch"], "scores": scores, "rules": rules}


def summary(values: list[float]) -> Found:
    estimate = over_seeds(values)
    return {"mean": estimate.mean, "ci95": estimate.ci95}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        found = course(args.folder)
        make_folder(args.out or args.folder)
        write_json((args.out or args.folder) / "course.json", found)
    except InputError as error:
        print(f"read_course: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
