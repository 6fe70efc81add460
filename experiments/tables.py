"""Write the tables of this folder's pages anew from the files below results/.

A table stands between two lines, ``<!-- table: results/NAME -->`` and ``<!-- end -->``; no number in it is typed
by hand. ``table`` is what `gametalearn compare` prints, with the time of a meta-iteration (results.json);
``benchmark`` the same for a training that is shorter than a published one, with the distance that is left and the
published numbers (results.json, course.json and published.json); ``course`` how the trainings went and how far each
rule departed from the mean (course.json, by read_course.py); ``probe`` what each rule gained one step ahead (probe.json,
by `gametalearn probe`), and ``gains`` the same beside its score after training (gains.json, by rank_gains.py);
``search`` the values of options that were tried (search.json, by search_options.py); ``cells`` one rule beside the plain
mean and trainings without corrupted tasks, on several data (NAME.json says which results these are); ``looks`` how
corrupted tasks differ from clean ones (the files that read_weights.py wrote).

example:
  python experiments/tables.py
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from gametalearn import InputError
from gametalearn.objective_tables import objective_tables
from gametalearn.probing.found import STEPS
from gametalearn.statistics import over_seeds
from gametalearn.stored import read_results
from gametalearn.tables import options_set, rows, title, verdict_of
from gametalearn.units import Units

HERE = Path(__file__).parent
OTHERS = (HERE.parent / "docs" / "gradient-agreement.md",)
TABLE = re.compile(
    r"(<!-- (table|benchmark|course|probe|gains|search|cells|looks): (\S+) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def markdown(results: dict[str, Any]) -> str:
    """What was compared, a row for each rule with its cost, each of several objectives, and how it was measured."""
    header, lines = rows(results)
    cost = [_milliseconds(results, rule) for rule in results["rules"]]
    table = [
        [*header, "ms per iteration"],
        *([*line, ms] for line, ms in zip(lines, cost, strict=True)),
    ]
    made, options = results["environment"], "".join(f" {one}" for one in options_set(results))
    several: list[str] = []
    for caption, head, body in objective_tables(results):
        several += ["", f"{caption[0].upper()}{caption[1:]}:", "", *lined([head, *body])]
    return "\n".join([
        f"{title(results)}.", "", *lined(table), *several, "",
        f"gametalearn {made['gametalearn']}, torch {made['versions']['torch']}, {made['device']}, "
        f"threads per run: {made['threads'] or 'all'}.{options}", "",
    ])  # fmt: skip


def lined(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first row is the header."""
    written = ["| " + " | ".join(row) + " |" for row in cells]
    return [written[0], "|" + "---|" * len(cells[0]), *written[1:]]


def _milliseconds(results: dict[str, Any], rule: str) -> str:
    """A meta-iteration's time without validation and test, of the fastest seed: others had other work beside them."""
    least = min(one["seconds"] for one in results["rules"][rule]["seeds"])
    shown = 1000 * least / results["iterations"]
    return f"{shown:.{0 if shown >= 10 else 1}f}"


def benchmark(folder: Path) -> str:
    """Each rule's score with the length of its training and what it made of the gradients, above published scores.

    published.json has a ``score`` as it was printed, ``iterations`` and how the setting ``differs``, by name.
    """
    results = read_results(folder)
    found = read_course(folder, results)["rules"]
    header, lines = rows(results)
    units = Units.of(results)
    at = list(next(iter(found.values()))["validation"])
    before, last = at[max(0, 2 * len(at) // 3 - 1)], at[-1]  # after two thirds, and all of it
    table = [[*header[:3], *header[-1:], "iterations", f"validation {units.heading} at {before} and {last}",
              "cosine to the mean", f"effective tasks of {results['meta_batch']}", "negative weights %",
              "ms per iteration", "what differs"]]  # fmt: skip
    for line in lines:
        one = found[line[0]]
        on_the_way = [units.show(one["validation"][when]["mean"]) for when in (before, last)]
        table.append([
            *line[:3], *line[-1:], f"{results['iterations']:,}", ", ".join(on_the_way),
            f"{one['cosine']['mean']:.3f}", f"{one['effective_tasks']['mean']:.2f}",
            f"{100 * one['negative_share']['mean']:.1f}", _milliseconds(results, line[0]), "",
        ])  # fmt: skip
    for name, one in read_json(folder / "published.json").items():
        length = f"{one['iterations']:,}" if one["iterations"] else "not stated"
        table.append([name, one["score"], "", "", length, *[""] * 5, one["differs"]])
    made = results["environment"]
    return "\n".join([f"{title(results)}.", "", *lined(table), "",
                      f"gametalearn {made['gametalearn']}.", ""])  # fmt: skip


def course(folder: Path) -> str:
    """For each rule its validated scores on the way, and what it made of the gradients."""
    results = read_results(folder)
    found = read_course(folder, results)
    rules, tasks, units = found["rules"], found["tasks"], Units.of(results)
    first = next(iter(rules.values()))
    at = list(first["validation"])
    header = ["rule", f"validation {units.heading} after {', '.join(at)}", "cosine to the mean",
              "length, times the mean's", f"effective tasks of {tasks}", "negative weights %", "rule, ms"]  # fmt: skip
    if spoiled := "corrupted_weight" in first:
        header.append("corrupted tasks' weight %")
    objectives = [name for name in first if name.startswith("share/")]
    header += [f"{name.removeprefix('share/')}'s weight at the end %" for name in objectives]
    lines = []
    for rule, one in rules.items():
        line = [
            rule,
            ", ".join(units.show(one["validation"][i]["mean"]) for i in at),
            f"{one['cosine']['mean']:.3f}",
            f"{one['length']['mean']:.2f}",
            f"{one['effective_tasks']['mean']:.1f}",
            f"{100 * one['negative_share']['mean']:.1f}",
            f"{1000 * one['rule_seconds']['mean']:.1f}",
        ]
        line += [f"{100 * one['corrupted_weight']['mean']:.0f}"] if spoiled else []
        lines.append([*line, *(f"{100 * one[name]['mean']:.0f}" for name in objectives)])
    said = [""]
    if spoiled and len(rules) > 2:
        weight = [one["corrupted_weight"]["mean"] for one in rules.values()]
        rho = spearmanr(weight, [results["rules"][rule][units.name] for rule in rules]).statistic
        said += [f"Rank correlation of the last column with the test {units.name}: {rho:.2f}.", ""]
    return "\n".join([*lined([header, *lines]), *said])


def probed(folder: Path) -> str:
    """What each rule gained at each checkpoint of a probe, by kind of step, and where its update points."""
    checkpoints = read_json(folder / "probe.json")["checkpoints"]
    first = checkpoints[0]
    aim, baseline = first["aim"], first["baseline"]
    steps = list(first["rules"][baseline]["gains"])
    others = f"{first['reference']:,} {'clean' if aim == 'clean' else 'other'} tasks"
    header = ["iteration", "rule", f"cosine to {baseline}", f"cosine to the mean of {others}",
              f"effective tasks of {first['tasks']}", *(STEPS[step] for step in steps)]  # fmt: skip
    digits = {step: _digits(one["rules"][rule]["gains"][step][aim]
                            for one in checkpoints for rule in one["rules"]) for step in steps}  # fmt: skip
    lines = []
    for one in checkpoints:
        for rule, entry in one["rules"].items():
            told = ("cosine_uniform", "cosine_true", "effective_tasks")
            shown = [f"{entry[name]['mean']:.{3 if name != told[-1] else 1}f}" for name in told]
            cells = [_gain(entry["gains"][step][aim], digits[step]) for step in steps]
            lines.append([str(one["iteration"]), rule, *shown, *cells])
    return "\n".join([*lined([header, *lines]), ""])


def _digits(found: Iterable[dict[str, Any]]) -> int:
    """Two decimals of thousandths where no difference from the baseline reaches one, else one."""
    pairs = [one["minus_baseline"] for one in found]
    return 2 if max((abs(1000 * pair["mean"]) for pair in pairs if pair), default=1) < 1 else 1


def _gain(found: dict[str, Any], digits: int) -> str:
    """A gain in thousandths, and for all but the baseline its difference from the baseline's."""
    text = f"{1000 * found['mean']:z.{digits}f}"
    if (pair := found["minus_baseline"]) is None:
        return text
    mean, low, high = (f"{1000 * value:+z.{digits}f}" for value in (pair["mean"], *pair["ci95"]))
    return f"{text}: {mean} [{low}, {high}]"


def gains(folder: Path) -> str:
    """Each rule's gain one step ahead, its score after training, and how their ranks correlate."""
    found, units = read_json(folder / "gains.json"), Units.of(read_results(folder))
    score, baseline, steps = found["score"], found["baseline"], list(found["correlations"])
    gain = (f"{STEPS[step]}: gain minus {baseline}'s" for step in steps)
    header = ["rule", *gain, f"test {units.heading}"]
    largest = (max(abs(1000 * one[step]) for one in found["rules"].values()) for step in steps)
    digits = dict(zip(steps, (2 if size < 1 else 1 for size in largest), strict=True))
    lines = [
        [
            rule,
            *(f"{1000 * one[step]:+z.{digits[step]}f}" for step in steps),
            units.show(one[score]),
        ]
        for rule, one in sorted(found["rules"].items(), key=lambda item: -item[1][score])
    ]
    lines.append([
        "**rank correlation**",
        *(f"{one['rho']:+.2f} (p = {one['p_value']:.2g})" for one in found["correlations"].values()),
        "",
    ])  # fmt: skip
    return "\n".join([*lined([header, *lines]), ""])


def search(folder: Path) -> str:
    """What was tried, each objective's validated accuracy, and the mean relative change from the plain mean."""
    found = read_json(folder / "search.json")
    header = ["tried", *(f"{name}, validation accuracy %" for name in found["cells"][0]["validation"]),
              "mean relative change %"]  # fmt: skip
    lines = [
        [
            cell["tried"],
            *(f"{100 * value:.2f}" for value in cell["validation"].values()),
            f"{100 * cell['change']:+.2f}",
        ]
        for cell in found["cells"]
    ]
    length = "" if found["iterations"] is None else f"{found['iterations']:,} iterations, "
    seeds = found.get("seeds")  # several: their mean
    said = (
        f"Seed {found['seed']}, {length}one training each."
        if seeds is None
        else f"Seeds {' and '.join(map(str, seeds))}, {length}the mean of one training each."
    )
    return "\n".join([*lined([header, *lines]), "", said, ""])


def read_cells(place: Path) -> list[dict[str, Any]]:
    """What a list of cells names, each with its results beside it, and those without corrupted tasks, if any.

    NAME.json has a ``rule`` and ``cells``: ``data``, ``tasks`` in words, whether the rule was ``set_on`` them, the
    folder of ``results``, and that of the ``oracle``, trainings with the plain mean on the clean tasks alone.
    """
    listed = read_json(place.with_name(f"{place.name}.json"))
    found = []
    for cell in listed["cells"]:
        results = read_results(place.parent / cell["results"])
        score = results["metric"]["name"]
        pair = next(pair for pair in results["paired"] if pair["rule"] == listed["rule"])
        one = {
            **cell, "rule": listed["rule"], "units": Units.of(results), "pair": pair,
            "base": results["rules"][pair["baseline"]], "own": results["rules"][listed["rule"]],
            "verdict": verdict_of(results, pair), "commits": [_commit(results)],
        }  # fmt: skip
        if cell["oracle"]:
            known = read_results(place.parent / cell["oracle"])
            best = known["rules"][pair["baseline"]]
            seeds = [[s["seed"] for s in found["seeds"]] for found in (one["own"], best)]
            if seeds[0] != seeds[1] or score != known["metric"]["name"]:
                raise InputError(
                    f"{cell['results']} and {cell['oracle']} have other seeds or scores"
                )
            behind = [
                a[score] - b[score] for a, b in zip(one["own"]["seeds"], best["seeds"], strict=True)
            ]
            gain = best[score] - one["base"][score]
            one |= {"best": best, "behind": over_seeds(behind), "share": pair["difference"] / gain}
            one["commits"].append(_commit(known))
        found.append(one)
    return found


def cells(place: Path) -> str:
    """A line for each cell: the plain mean, the rule, trainings that know the clean tasks, and their differences."""
    found = read_cells(place)
    first = found[0]
    rule, base, units = first["rule"], first["pair"]["baseline"], first["units"]
    header = ["data", "tasks", f"{rule} was set on them", base, rule, f"minus {base} [95%]", "verdict",
              "clean tasks alone", f"{rule} minus that [95%]", "share of its gain %", "commits"]  # fmt: skip
    lines = []
    for one in found:
        pair = one["pair"]
        scores = [_over_seeds(one[kind], units) for kind in ("base", "own")]
        line = [one["data"], one["tasks"], "yes" if one["set_on"] else "no", *scores,
                _interval(pair["difference"], pair["ci95"], units), one["verdict"]]  # fmt: skip
        if "best" in one:
            behind = one["behind"]
            line += [_over_seeds(one["best"], units), _interval(behind.mean, behind.ci95, units),
                     f"{100 * one['share']:.0f}"]  # fmt: skip
        line += [""] * (len(header) - 1 - len(line))
        lines.append([*line, ", ".join(dict.fromkeys(one["commits"]))])
    said = f"Test {units.heading}; commits of the rules and of the trainings on clean tasks alone."
    return "\n".join([*lined([header, *lines]), "", said, ""])


def _commit(results: dict[str, Any]) -> str:
    """The commit of a comparison, or its version where there is none."""
    version: str = results["environment"]["gametalearn"]
    found = re.search(r"commit (\w{7})", version)
    return version if found is None else found[1]


def _over_seeds(entry: dict[str, Any], units: Units) -> str:
    return f"{units.show(entry[units.name])} ± {units.show(entry['ci95'])}"


def _interval(mean: float, ci95: Sequence[float], units: Units) -> str:
    scale = 100 if units.percent else 1
    shown, low, high = (f"{scale * value:+z.2f}" for value in (mean, *ci95))
    return f"{shown} [{low}, {high}]"


def looks(folder: Path) -> str:
    """How losses and cosines differ between clean and corrupted tasks, a line for each file of read_weights.py."""
    found = [read_json(file) for file in sorted(folder.glob("*.json"))]
    if not found:
        raise InputError(f"{folder}: no files of read_weights.py there")
    found.sort(key=lambda one: (one["tasks"] != "shuffled", one["tasks"], one["iterations"]))
    header = ["tasks", "iterations", "higher loss if corrupted, % of pairs", "cosine, single tasks",
              "cosine, mean gradients", "length, clean", "length, corrupted"]  # fmt: skip
    lines = [
        [
            one["tasks"], "{} to {}".format(*one["iterations"]), f"{100 * one['seen']['higher_loss']:.1f}",
            f"{one['seen']['cosine_between']:+.3f}", f"{one['seen']['cosine_means']:+.3f}",
            f"{one['seen']['length_clean']:.2f}", f"{one['seen']['length_spoiled']:.2f}",
        ]
        for one in found
    ]  # fmt: skip
    return "\n".join([*lined([header, *lines]), ""])


def read_course(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """course.json, which must be of the trainings of results.json."""
    found: dict[str, Any] = read_json(folder / "course.json")
    score = results["metric"]["name"]
    scores = {
        rule: {str(one["seed"]): one[score] for one in entry["seeds"]}
        for rule, entry in results["rules"].items()
    }
    if found.get("scores") != scores:
        raise InputError(
            f"{folder / 'course.json'}: not of the trainings of the results.json beside it; write it anew by "
            "read_course.py"
        )
    return found


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


KINDS: dict[str, Callable[[Path], str]] = {
    "table": lambda folder: markdown(read_results(folder)),
    "benchmark": benchmark,
    "course": course,
    "probe": probed,
    "gains": gains,
    "search": search,
    "cells": cells,
    "looks": looks,
}


def renewed(page: Path) -> str:
    """A page's text with its tables written anew.

    Raises:
        InputError: the page or results that a table names are not there, or damaged; or a table of no known kind.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{page}: cannot be read ({error})") from error

    def table(found: re.Match[str]) -> str:
        try:
            return f"{found[1]}\n{KINDS[found[2]](page.parent / found[3])}\n{found[4]}"
        except (LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{page}, {found[2]} of {found[3]}: damaged results ({error!r})"
            ) from error

    if unknown := set(re.findall(r"<!-- (\w+): \S+ -->", text)) - KINDS.keys():
        raise InputError(f"{page}: no table '{min(unknown)}'; there are {', '.join(KINDS)}")
    return TABLE.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, nargs="*", default=[*sorted(HERE.glob("*.md")), *OTHERS],
                        help="Markdown files (default: all of this folder, and docs/gradient-agreement.md)")  # fmt: skip
    try:
        for page in parser.parse_args(argv).pages:
            page.write_text(renewed(page), encoding="utf-8")
    except InputError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
