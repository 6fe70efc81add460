"""What `gametalearn.results` wrote, read again: older versions, damaged files, earlier looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gametalearn.errors import InputError, summary
from gametalearn.evaluation import Evaluation
from gametalearn.results import (
    BEFORE,
    DAMAGE,
    SCHEMA,
    adjusted,
    digest_of,
    looks_in,
    pair_of,
)
from gametalearn.scores import SCORES
from gametalearn.statistics import over_seeds

__all__ = ["earlier_looks", "other_looks", "read_evaluation", "read_results", "version_in"]


def read_results(folder: Path) -> dict[str, Any]:
    """The content of a comparison's ``results.json``, older ones in the form of today's.

    Schema 1 kept no differences over seeds; they follow from each seed's means. What it did not keep
    is None, and so is an interval over episodes that pooled several objectives.

    Raises:
        InputError: no such file, damaged, or of another version.
    """
    file = folder / "results.json"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); give the folder that compare --out wrote"
        ) from error
    except ValueError as error:
        raise InputError(f"{file}: damaged ({summary(error)})") from error
    try:
        found = json.loads(text, parse_constant=_refused)
        schema = found["schema"]
        if schema == BEFORE:
            found = _upgraded(found)
        elif schema == SCHEMA:
            _check(found)
    except (*DAMAGE, RecursionError) as error:
        raise InputError(f"{file}: damaged ({summary(error)})") from error
    if schema not in (BEFORE, SCHEMA):
        raise InputError(f"{file}: schema {schema!r}; this version reads '{BEFORE}' and '{SCHEMA}'")
    return found  # type: ignore[no-any-return]


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _check(found: dict[str, Any]) -> None:
    """Is what tables, plots and reports use there, and of its kind?"""
    metric = found["metric"]["name"]
    seeds = [one["seed"] for one in next(iter(found["rules"].values()))["seeds"]]
    for entry in found["rules"].values():
        numbers = [entry[metric], *(one[metric] for one in entry["seeds"])]
        numbers += [one["seconds"] for one in entry["seeds"]]
        numbers += [entry[key] for key in ("ci95", "ci95_episodes") if entry[key] is not None]
        if [one["seed"] for one in entry["seeds"]] != seeds or not seeds:
            raise ValueError("rules of different seeds")
        for part in entry.get("objectives", {}).values():
            numbers += [part[metric], *([] if part["ci95"] is None else [part["ci95"]])]
            if "minus_single" in part:
                numbers += _of_estimate(part["minus_single"], "difference")
        numbers += [entry["mean_rank"]] if "mean_rank" in entry else []
        if entry.get("delta_m") is not None:
            numbers += _of_estimate(entry["delta_m"], "mean")
        for number in numbers:
            _number(number)
    for pair in found["paired"]:
        if not {pair["rule"], pair["baseline"]} <= found["rules"].keys():
            raise ValueError("a pair of rules that are not there")
        if not len(pair["by_seed"]) == pair["seeds"] == len(seeds):
            raise ValueError("differences of other seeds")
        optional = [pair["p_value"], pair["p_holm"], *(pair["ci95"] or [])]
        optional += [*(pair["episodes"]["ci95"] or []), pair["episodes"]["p_value"]]
        for number in [pair["difference"], *pair["by_seed"], *filter(None, optional)]:
            _number(number)
        for part in pair.get("objectives", {}).values():
            for number in _of_estimate(part, "difference"):
                _number(number)
    for value in found.get("brought_to", {}).values():
        _number(value)
    for one in found.get("single", {}).values():
        for number in (one[metric], one["tasks"], one["budget"], *filter(None, [one["ci95"]])):
            _number(number)
        ", ".join(one.get("differs", []))  # raises where one is no text
    for name in ("dataset", "learner", "protocol"):
        if not isinstance(found[name], str):
            raise ValueError(f"{name} is no text")
    for name in ("environment", "config"):
        found[name].items()
    if not (metric and isinstance(metric, str) and isinstance(found["metric"]["format"], str)):
        raise ValueError("a metric without a name")
    bool(found["metric"]["higher_is_better"])
    for name in ("ways", "shots", "queries", "iterations", "meta_batch", "episodes"):
        if found[name] is not None:
            _number(found[name])


def _of_estimate(found: dict[str, Any], key: str) -> list[Any]:
    """The numbers of a mean with its interval and each seed's value, as far as they are there."""
    seeds = [value for value in found["by_seed"] if value is not None]
    return [found[key], *seeds, *(found["ci95"] or [])]


def _number(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")


def _upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """What schema 1 said, in schema 2."""
    usual = "accuracy" if old["ways"] is not None else "mse"
    usual_metric = {k: getattr(SCORES[usual], k) for k in ("name", "higher_is_better", "format")}
    metric = old.get("metric", usual_metric)
    name, pairs = metric["name"], []
    rules: dict[str, dict[str, Any]] = {}
    for rule, entry in old["rules"].items():
        over = over_seeds([one[name] for one in entry["seeds"]])
        several = "objectives" in entry
        rules[rule] = {
            name: over.mean,
            "ci95": over.half,
            "ci95_episodes": None if several else entry["ci95"],
            "seeds": [
                {
                    "seed": one["seed"],
                    name: one[name],
                    "ci95_episodes": None if several else one["ci95"],
                    "seconds": one["seconds"],
                    "best_iteration": one.get("best_iteration"),
                }
                for one in entry["seeds"]
            ],
        }
        if several:
            rules[rule]["objectives"] = {
                objective: {name: part[name], "ci95": None, "ci95_episodes": part["ci95"]}
                for objective, part in entry["objectives"].items()
            }
    for pair in old["paired"]:
        mine, theirs = (
            [one[name] for one in rules[pair[key]]["seeds"]] for key in ("rule", "baseline")
        )
        by_seed = [a - b for a, b in zip(mine, theirs, strict=True)]
        several = "objectives" in rules[pair["rule"]]
        episodes = {"ci95": None, "p_value": None}
        if not several:
            episodes = {key: pair[key] for key in episodes}
        pairs.append(
            pair_of(
                pair["rule"], pair["baseline"], by_seed, metric["higher_is_better"], episodes
            )
        )  # fmt: skip
    kept = ("dataset", "ways", "shots", "queries", "learner", "iterations", "meta_batch")
    found = {
        "schema": SCHEMA,
        **{key: old[key] for key in (*kept, "episodes", "protocol")},
        "metric": metric,
        "environment": {},
        "rules": rules,
        "paired": adjusted(pairs, ()),
        "config": old["config"],
    }
    _check(found)
    return found


def earlier_looks(folder: Path, results: dict[str, Any]) -> list[int]:
    """How many seeds had been looked at before those of ``results`` were complete, each time."""
    counts = set()
    for rule, entry in results["rules"].items():
        now = {one["seed"] for one in entry["seeds"]}
        for look in _looks(folder, results):
            before = set(look["seeds"]) if rule in look["rules"] else set()
            if len(before) > 1 and before < now:
                counts.add(len(before))
    return sorted(counts)


def other_looks(folder: Path, results: dict[str, Any]) -> list[str]:
    """What was chosen after earlier results had been seen: seeds, rules, what is primary. Sentences."""
    rules, primary = list(results["rules"]), results.get("primary") or []
    seeds = {one["seed"] for one in next(iter(results["rules"].values()))["seeds"]}
    looks = [look for look in _looks(folder, results) if set(look["rules"]) & set(rules)]
    left_out = dict.fromkeys(n for look in looks for n in look["rules"] if n not in rules)
    dropped = sorted({seed for look in looks for seed in look["seeds"]} - seeds)
    unnamed = any(set(look["rules"]) >= set(primary) and not look["primary"] for look in looks)
    found = []
    if left_out:
        found.append(
            f"Results of {', '.join(left_out)} were written here before, and are left out now: p_holm "
            "does not count what was looked at and dropped."
        )
    if dropped:
        found.append(
            f"Results of other seeds ({', '.join(map(str, dropped))}) were written here before: which "
            "seeds count must not depend on what they showed."
        )
    if primary and unnamed:
        found.append(
            f"{', '.join(primary)} {'was' if len(primary) == 1 else 'were'} named as primary after results "
            "had been written; that does not count."
        )
    return found


def _looks(folder: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier looks at results of these settings; those of older versions do not tell theirs."""
    own = digest_of(results["config"])
    return [look for look in looks_in(folder) if look["of"] in ("", own)]


def version_in(file: Path) -> str:
    """The version that tested a run, as its ``evaluation.json`` tells; "" if it does not."""
    try:
        return str(json.loads(file.read_text()).get("version", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def read_evaluation(file: Path, wanted: dict[str, Any]) -> Evaluation | None:
    """The test that a file keeps; None if there is none, or its record differs from ``wanted``."""
    try:
        stored = json.loads(file.read_text())
        values = np.array(stored["values"], dtype=np.float64)
        group = np.array(stored["group"], dtype=np.int64)
        found = {name: stored[name] for name in wanted}
        episodes = (stored["episodes"],)
        kept = Evaluation(
            values, group, str(stored["metric"]), stored["protocol"], int(stored["seed"])
        )
    except (OSError, *DAMAGE):
        return None
    if found != wanted or values.shape != episodes or group.shape != episodes:
        return None
    return kept if np.isfinite(values).all() else None
