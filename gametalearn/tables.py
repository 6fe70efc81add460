"""A comparison in words: the table of the terminal, its notes, and a sentence for each rule.

All of it comes from the content of ``results.json`` (schema ``gametalearn.compare/2``), so that a
finished comparison reads the same when its files are all that is left.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gametalearn.objective_tables import objective_notes, objective_tables
from gametalearn.places import folder_of, names_in
from gametalearn.statistics import FEWEST, LEVEL, seeds_needed, verdict
from gametalearn.units import Units
from gametalearn.words import counted

__all__ = [
    "WIDTH",
    "aligned",
    "needed",
    "notes",
    "options_set",
    "rows",
    "sentence",
    "subject",
    "table",
    "title",
    "verdict_of",
]

WIDTH = 100
"""Columns of a terminal that a table fits into."""

HALF_A_POINT = 0.005
TWENTIETH = 0.05
"""The difference that `needed` asks about: of shares half a point, else a part of the baseline."""


def subject(found: Mapping[str, Any]) -> str:
    """The data set in short, ways and shots, of results or of settings.

    >>> subject({"dataset": "glyphs+folder:/data/birds", "ways": 5, "shots": 1})
    'glyphs+birds, 5-way 1-shot'
    """
    paths = ((name, folder_of(name)) for name in names_in(found["dataset"]))
    names = "+".join(name if path is None else Path(path).name or name for name, path in paths)
    what = "regression" if found["ways"] is None else f"{found['ways']}-way"
    return f"{names}, {what} {found['shots']}-shot"


def title(results: dict[str, Any]) -> str:
    """What was compared, in a line."""
    what = "regression" if results["ways"] is None else f"{results['ways']}-way"
    seeds = _seeds(results)
    return (
        f"{results['dataset']}, {what} {results['shots']}-shot, {results['learner']}, "
        f"{counted(results['iterations'], 'iteration')}, {counted(seeds, 'seed')} x "
        f"{counted(results['episodes'], 'test episode')}, {results['protocol']}"
    )


def table(results: dict[str, Any]) -> str:
    """The final table: a line for each rule, and below it what the numbers mean."""
    blocks = [*textwrap.wrap(title(results), WIDTH), "", *aligned(*rows(results))]
    for caption, header, lines in objective_tables(results, WIDTH):
        blocks += ["", *textwrap.wrap(caption, WIDTH), *aligned(header, lines)]
    said = [*notes(results), *_more_seeds(results)]
    return "\n".join([*blocks, "", *(s for n in said for s in textwrap.wrap(n, WIDTH))])


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of the final table."""
    units, metric = Units.of(results), results["metric"]["name"]
    pairs = {pair["rule"]: pair for pair in results["paired"]}
    several = _seeds(results) >= FEWEST
    header = ["rule", f"test {units.heading}"]
    if pairs:
        baseline = results["paired"][0]["baseline"]
        header += [f"minus {baseline} [95%]", "p_holm"] if several else [f"minus {baseline}"]
        header += ["ahead", "verdict"] if several else ["ahead"]
    lines = []
    for rule, entry in results["rules"].items():
        line = [rule, units.with_half(entry[metric], entry["ci95"])]
        if pair := pairs.get(rule):
            line.append(units.difference(pair))
            line += [_p_value(pair["p_holm"])] if several else []
            line.append(f"{pair['seeds_ahead']} of {pair['seeds']}")
            line += [verdict_of(results, pair)] if several else []
        lines.append(line + [""] * (len(header) - len(line)))
    return header, lines


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with columns of equal width; closer to each other where they get too wide."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    gap = " " * (2 if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else 1)
    text = [
        gap.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in [header, *lines]
    ]
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def verdict_of(results: dict[str, Any], pair: dict[str, Any]) -> str:
    """``ahead``, ``behind`` or ``no difference shown``."""
    return verdict(pair["difference"], pair["p_holm"], results["metric"]["higher_is_better"])


def needed(results: dict[str, Any], pair: dict[str, Any]) -> str:
    """How many seeds it would take to show half a point; "" where that cannot be said.

    Where values are no shares, a twentieth of the baseline's mean takes the place of half a point.
    """
    units = Units.of(results)
    mean = abs(float(results["rules"][pair["baseline"]][units.name]))
    smallest = HALF_A_POINT if units.percent else TWENTIETH * mean
    family = [p for p in results["paired"] if _primary(results, p) == _primary(results, pair)]
    if not smallest > 0:
        return ""
    found = seeds_needed(pair["by_seed"], smallest, len(family))
    if found is None:
        return ""
    least, most = (None if n is None else _rounded(n) for n in found)
    if most is None:
        count = f"{least} seeds or many more"
    else:
        count = f"{least} seeds" if most == least else f"{least} to {most} seeds"
    what = "half a point" if units.percent else f"a difference of {units.size(smallest)}"
    return f"showing {what} would take {count}"


def sentence(results: dict[str, Any], pair: dict[str, Any]) -> str:
    """What a reader wants to know of a rule, in a sentence or two."""
    units, rule, baseline = Units.of(results), pair["rule"], pair["baseline"]
    seeds, by_seed = pair["seeds"], [units.show(d, "+") for d in pair["by_seed"]]
    unit = "points" if units.percent else units.name
    if seeds < FEWEST:
        return (
            f"{rule} minus {baseline}: {' and '.join(by_seed)} {unit} on {counted(seeds, 'seed')}, "
            "too few for an interval or a test."
        )
    if pair["p_holm"] is None:
        return (
            f"No difference shown between {rule} and {baseline}: {by_seed[0]} {unit} on each of "
            f"{seeds} seeds; equal differences do not show how much they vary."
        )
    low, high = pair["ci95"]
    word = verdict_of(results, pair)
    if word in ("ahead", "behind"):
        ends = sorted((abs(low), abs(high)))
        on = pair["seeds_ahead"] if word == "ahead" else _behind(results, pair)
        return (
            f"{rule} is {word} {'of ' * (word == 'ahead')}{baseline} by "
            f"{units.size(abs(pair['difference']))} (95% interval over {seeds} seeds: "
            f"{units.show(ends[0])} to {units.show(ends[1])}; p_holm {_p_value(pair['p_holm'])}), "
            f"{word} on {on} of {seeds} seeds."
        )
    more = needed(results, pair)
    return (
        f"No difference shown between {rule} and {baseline}: {units.size(pair['difference'], '+')} "
        f"(95% interval over {seeds} seeds: {units.show(low, '+')} to {units.show(high, '+')}; "
        f"p_holm {_p_value(pair['p_holm'])}), ahead on {pair['seeds_ahead']} of {seeds} seeds"
        f"{'; ' * bool(more)}{more}."
    )


def notes(results: dict[str, Any]) -> list[str]:
    """What the numbers of the table mean, and how far they reach."""
    units, seeds, pairs = Units.of(results), _seeds(results), results["paired"]
    several = len(next(iter(results["rules"].values())).get("objectives", {}))
    if seeds < FEWEST:
        found = [
            f"{seeds} seed{'s are' if seeds > 1 else ' is'} too few for an interval or a test over "
            f"seeds, and so for a verdict; {_further(results)} trains only those that are missing."
        ]
        if seeds > 1 and pairs:
            found[0] += " In brackets: the difference on each seed."
    else:
        found = [
            f"± and [ ] are 95% intervals over the {seeds} seeds, for the mean over other seeds with the "
            "same classes and settings; each stands on its own."
        ]
        if pairs:
            found[0] += (
                f" p_holm is the p-value of a paired t test over seeds, {_families(results)}; a verdict "
                f"needs p_holm < {LEVEL}."
            )
    found += options_set(results)
    if versions := results.get("versions"):
        found.append(
            f"These runs were made by different versions ({'; '.join(map(str, versions))}), which may "
            "compute differently; --overwrite trains all of them by one."
        )
    if several > 1:
        found.append(
            f"All means and differences are over the {several} objectives that were tested, each of which "
            "counts the same however many test episodes it had."
        )
        found += objective_notes(results)
    if halves := [
        (p["episodes"]["ci95"][1] - p["episodes"]["ci95"][0]) / 2
        for p in pairs
        if p["episodes"]["ci95"]
    ]:
        found.append(
            f"The finite number of test episodes leaves up to ± {units.size(max(halves))} on the differences "
            "between these trained models, and says nothing about other seeds."
        )
    return found


def options_set(results: dict[str, Any]) -> list[str]:
    """The options of rules that were set, in a sentence; none where there are none."""
    told = [
        f"{rule} ({', '.join(f'{name} {value}' for name, value in own.items())})"
        for rule, own in (results["config"].get("rule_options") or {}).items()
    ]
    return [f"Options that were set: {', '.join(told)}."] if told else []


def _further(results: dict[str, Any]) -> str:
    """The flag that adds seeds to those that are there."""
    there = [one["seed"] for one in next(iter(results["rules"].values()))["seeds"]]
    if set(there) <= set(range(5)):
        return "--seeds 5"
    return "--seeds " + ",".join(map(str, [*there, *(s for s in range(5) if s not in there)][:5]))


def _more_seeds(results: dict[str, Any]) -> list[str]:
    """For each rule of which no difference is shown, how many seeds it would take."""
    return [
        f"{pair['rule']}: {more}."
        for pair in results["paired"]
        if verdict_of(results, pair) == "no difference shown" and (more := needed(results, pair))
    ]


def _families(results: dict[str, Any]) -> str:
    """How the p-values were adjusted."""
    primary = [p["rule"] for p in results["paired"] if _primary(results, p)]
    rest = len(results["paired"]) - len(primary)
    if not primary or not rest:
        count = len(results["paired"])
        return f"adjusted for {count} rules (Holm)" if count > 1 else "not adjusted for one rule"
    return (
        f"adjusted (Holm) within each of two families, {', '.join(primary)} (primary) and the other "
        f"{rest}"
    )


def _rounded(seeds: int) -> int:
    """To two digits: what comes of an estimated spread is no exact number."""
    return int(float(f"{seeds:.2g}"))


def _seeds(results: dict[str, Any]) -> int:
    return len(next(iter(results["rules"].values()))["seeds"])


def _primary(results: dict[str, Any], pair: dict[str, Any]) -> bool:
    return pair["rule"] in results.get("primary", ())


def _behind(results: dict[str, Any], pair: dict[str, Any]) -> int:
    higher = results["metric"]["higher_is_better"]
    return sum((d < 0) if higher else (d > 0) for d in pair["by_seed"])


def _p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
