"""Does a gain one step ahead tell which rule trains best? The rank correlation of the two, over the rules.

A probe (`gametalearn probe`) gives each rule's gain minus the baseline's, here averaged over the probed checkpoints; a
comparison of the same rules (`gametalearn compare`) gives their accuracies after training. Both are written as
gains.json, with Spearman's correlation for each kind of step, from which tables.py makes a table.

example:
  python experiments/rank_gains.py runs/probed/probe.json runs/rules-clean --out experiments/results/rules-clean
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gametalearn import InputError
from gametalearn.files import make_folder, write_json
from gametalearn.stored import read_results

EXACT = 7
"""Rules up to which all orders are counted: 5,040."""

MAY_DIFFER = {
    "rule", "rule_options", "seed", "threads", "device", "log_every", "log_matrices", "validate_every",
    "validation_episodes", "checkpoint_every", "keep_every",
}  # fmt: skip
"""Settings that the probed run and the comparison need not share; options of rules are compared apart."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("probe", type=Path, help="probe.json")
    parser.add_argument("folder", type=Path, help="what compare --out wrote")
    parser.add_argument("--out", type=Path, help="folder of gains.json (default: the second)")
    return parser.parse_args(argv)


def gains(probe: Path, folder: Path) -> dict[str, Any]:
    """By rule the mean gain minus the baseline's for each step, and the rank correlations.

    Raises:
        InputError: a file that is missing or damaged, fewer than three rules in both besides the baseline,
            or settings that differ.
    """
    results = read_results(folder)
    try:
        probed = json.loads(probe.read_text(encoding="utf-8"))["checkpoints"]
        # of `--checkpoint all`, the latest may have been kept under its number as well
        checkpoints = list({one["iteration"]: one for one in probed}.values())
        both = [rule for rule in checkpoints[0]["rules"] if rule in results["rules"]]
        for one in checkpoints:
            alike(one["config"], results["config"], f"{probe} and {folder}", both)
        return ranked(checkpoints, results, both, f"{probe} and {folder}")
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{probe}: no probe, or a damaged one ({error!r})") from error


def alike(one: dict[str, Any], other: dict[str, Any], what: str, rules: Iterable[str]) -> None:
    """Check that two runs' settings are those of one experiment.

    Raises:
        InputError: they differ in a setting, or in the options of a rule; it is named.
    """
    for key in sorted((one.keys() & other.keys()) - MAY_DIFFER):
        if one[key] != other[key]:
            raise InputError(
                f"{what} differ in `{key}` ({one[key]}, {other[key]}); compare a probe and trainings of "
                "the same settings"
            )
    for rule in rules:
        options = [found.get("rule_options", {}).get(rule, {}) for found in (one, other)]
        if options[0] != options[1]:
            raise InputError(
                f"{what} differ in the options of '{rule}' ({options[0]}, {options[1]})"
            )


def ranked(
    checkpoints: list[dict[str, Any]], results: dict[str, Any], both: list[str], what: str
) -> dict[str, Any]:
    """See `gains`; ``both`` are the rules of probe and comparison."""
    first = checkpoints[0]
    baseline, aim, score = first["baseline"], first["aim"], results["metric"]["name"]
    if len(both) < 4 or baseline not in both:
        raise InputError(
            f"{what}: rules in both are {', '.join(both) or 'none'}; a rank correlation "
            f"takes '{baseline}' and at least three others"
        )
    sign = 1 if results["metric"]["higher_is_better"] else -1
    scores = {rule: results["rules"][rule][score] for rule in both}
    rules: dict[str, Any] = {rule: {score: scores[rule]} for rule in both}
    correlations = {}
    for step in first["rules"][baseline]["gains"]:
        for rule in both:
            own, base = (
                [one["rules"][name]["gains"][step][aim]["mean"] for one in checkpoints]
                for name in (rule, baseline)
            )
            rules[rule][step] = float(np.mean(np.subtract(own, base)))
        if any(len({one[key] for one in rules.values()}) == 1 for key in (step, score)):
            raise InputError(
                f"{what}: all gains or scores are equal, and have no ranks to correlate"
            )
        rho, p_value = rank_correlation(
            [rules[rule][step] for rule in both], [sign * scores[rule] for rule in both]
        )
        correlations[step] = {"rho": rho, "p_value": p_value}
    return {
        "baseline": baseline,
        "aim": aim,
        "score": score,
        "iterations": [one["iteration"] for one in checkpoints],
        "meta_batches": first["meta_batches"],
        "rules": rules,
        "correlations": correlations,
    }


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float]:
    """Spearman's, and its two-sided p-value: exact for up to seven pairs, by the t distribution for more."""
    found = stats.spearmanr(x, y)
    rho, p_value = float(found.statistic), float(found.pvalue)
    if len(x) <= EXACT:
        ranks, others = stats.rankdata(x), stats.rankdata(y)
        shift = len(x) * ranks.mean() * others.mean()
        orders = np.array(list(itertools.permutations(others))) @ ranks - shift
        p_value = float((abs(orders) >= abs(ranks @ others - shift) - 1e-9).mean())
    return rho, p_value


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        found = gains(args.probe, args.folder)
        make_folder(args.out or args.folder)
        write_json((args.out or args.folder) / "gains.json", found)
    except InputError as error:
        print(f"rank_gains: {error}", file=sys.stderr)
        return 2
    for step, one in found["correlations"].items():
        print(f"{step}: rank correlation {one['rho']:+.2f} (p = {one['p_value']:.2g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
