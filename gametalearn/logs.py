"""What the runs of a comparison logged, as far as pictures and cautions go by it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gametalearn.errors import InputError, summary
from gametalearn.jobs import place_of

__all__ = ["Record", "Records", "records_of"]


@dataclass(frozen=True)
class Record:
    """What is drawn of a line of ``metrics.jsonl``.

    Attributes:
        iteration: meta-updates done.
        effective: ``(T,)``, the weights of the tasks.
        validation: the score, NaN where it diverged; None where the line has none.
        skipped: tasks left out so far.
        objectives: T names, of each task's objective; empty where they are not told.
        facts: what the rule told, such as ``r`` or ``kappa``, by the objective's name.
    """

    iteration: int
    effective: np.ndarray[Any, np.dtype[np.float64]]
    validation: float | None
    skipped: int = 0
    objectives: tuple[str, ...] = ()
    facts: dict[str, dict[str, float]] = field(default_factory=dict)


Records = dict[str, list[list[Record]]]
"""Of each rule, for each seed."""


def records_of(folder: Path, results: dict[str, Any]) -> Records:
    """The metrics of a comparison's runs, which lie below its folder.

    Raises:
        InputError: a run's metrics are missing or damaged.
    """
    metric = results["metric"]["name"]
    return {
        rule: [_records(place_of(folder, rule, one["seed"]), metric) for one in entry["seeds"]]
        for rule, entry in results["rules"].items()
    }


def _records(place: Path, metric: str) -> list[Record]:
    file = place / "metrics.jsonl"
    try:
        records = []
        for line in file.read_text().splitlines():
            r = json.loads(line)
            value = r["validation"][metric] if "validation" in r else None
            value = math.nan if "validation" in r and value is None else value
            effective = np.array(r["effective"], dtype=np.float64).reshape(-1)
            record = Record(
                int(r["iteration"]), effective, value and float(value), int(r.get("skipped", 0)),
                _objectives(r, len(effective)), _facts(r),
            )  # fmt: skip
            records.append(record)
        if not records or not len(records[0].effective):
            raise ValueError("no lines")
    except (OSError, LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(
            f"{file}: cannot be read ({summary(error)}); the results stand, only the plots need it"
        ) from error
    return records


def _facts(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        fact: {name: float(value) for name, value in told.items()}
        for fact, told in record.get("rule", {}).items()
    }


def _objectives(record: dict[str, Any], tasks: int) -> tuple[str, ...]:
    """The name of each task's objective: those that are present, in the order of their numbers."""
    group, names = record.get("group", []), list(record.get("objectives", {}))
    present = sorted(set(group))
    if len(group) != tasks or len(present) != len(names):
        return ()
    name_of = dict(zip(present, names, strict=True))
    return tuple(name_of[number] for number in group)
