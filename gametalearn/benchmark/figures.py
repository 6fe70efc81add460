"""From the timings of all processes to the fields of the result: pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gametalearn.benchmark.sides import SIDES, Record, Side

__all__ = ["FIELDS", "LEAST_ROUNDS", "MOST_OTHERS", "field_of", "figures", "reasons"]

LEAST_ROUNDS = 3
"""Rounds below which the spread between them says nothing."""
MOST_OTHERS = 0.05
"""Share of the machine's CPU time that others may use while a side runs."""
PAIR: tuple[Side, Side] = ("gametalearn", "learn2learn")
EXACT = 1e-9
"""Relative error in float64 up to which two ways compute the same gradient."""

FIELDS: tuple[tuple[str, str], ...] = (
    ("config, setting", "The name of what was measured, and everything that belongs to it."),
    (
        "threads, rounds, repeats",
        "The PyTorch threads of every process, the rounds in which each side had a process of its own, "
        "and the timings that each process took after its warm-up.",
    ),
    (
        "gametalearn_ms",
        "The time of one meta-gradient with gametalearn in milliseconds: the median over the timings "
        "of all rounds, as every field that ends in _ms.",
    ),
    (
        "learn2learn_ms",
        "The same with learn2learn, in a process that has gametalearn's allocator settings.",
    ),
    (
        "learn2learn_as_shipped_ms",
        "The same with learn2learn as its users run it: the allocator is left alone.",
    ),
    (
        "first_order_ms",
        "The time of gametalearn's first-order meta-gradient (FOMAML).",
    ),
    (
        "floor_ms, first_order_floor_ms",
        "The time of the convolutions and matrix products alone that gametalearn's meta-gradient, and "
        "its first-order one, consist of.",
    ),
    ("speedup", "learn2learn_ms divided by gametalearn_ms."),
    ("speedup_as_shipped", "learn2learn_as_shipped_ms divided by gametalearn_ms."),
    (
        "speedup_by_round, speedup_as_shipped_by_round",
        "The same ratios from the medians of each round.",
    ),
    (
        "speedup_resolution, speedup_as_shipped_resolution",
        "The largest distance of a round's ratio from the ratio itself: differences smaller than this "
        "mean nothing. It is null if there was one round.",
    ),
    (
        ", ".join(f"{side.replace('-', '_')}_ms_quartiles" for side in SIDES),
        "The three quartiles of the timings of all rounds.",
    ),
    ("ms_by_round", "For each side, the median of each round."),
    (
        "round_spread",
        "For each side, the largest round's median less the smallest one's, divided by the median.",
    ),
    (
        "setup_s",
        "What the first call of a fresh process takes longer than a later one, in seconds: tracing the "
        "program, and comparing it with the plain loop. It is the median over the rounds.",
    ),
    (
        "peak_rss_mb",
        "The most memory that a process of gametalearn and one of learn2learn as shipped have held, in "
        "MiB, the libraries that each imports included.",
    ),
    (
        "float64_rel_error, float64_rel_error_learn2learn",
        "How far gametalearn's and learn2learn's rows in float64 are from a plain loop's: the norm of a "
        "row's error divided by that of the row, the largest over the tasks. Both are below "
        f"{EXACT:.0e} if both compute the same meta-gradient.",
    ),
    (
        "float32_rel_error",
        "The same for both sides in float32, over all rows of the timed batch at once. One crossed kink "
        "of a ReLU or of a max-pool decides it.",
    ),
    (
        "float32_rel_error_median, float32_kinks_crossed",
        "The median of the float32 error over the tasks of several batches, and the share of these "
        "tasks in which rounding has crossed a kink.",
    ),
    (
        "device, peak_device_mb",
        "What the sides were computed on: its name, and of a GPU whether PyTorch was free to compute "
        "float32 convolutions and products in TF32, which has ten bits of float32's 23. And the most "
        "memory of the GPU that the tensors of gametalearn and of learn2learn took, set-up included, in MiB; it "
        "is null on a CPU.",
    ),
    (
        "plan, allocator_keeps_memory",
        "How gametalearn shares the batch out to workers, and whether the allocator settings could be "
        "made on gametalearn's and learn2learn's side.",
    ),
    ("machine", "What was measured on, and its load average before the measurement."),
    (
        "others_share",
        "For each side, the share of the machine's CPU time that other processes, or the host of a "
        "virtual machine, used while it was timed; the largest over the rounds. It is null where the "
        "system does not tell.",
    ),
    (
        "publishable, not_publishable_because",
        "Whether the figures may be published, and every reason why not: others used more than "
        f"{MOST_OTHERS:.0%} of the machine, there were fewer than {LEAST_ROUNDS} rounds, the two sides "
        "did not compute the same, or gametalearn warned.",
    ),
    ("processes", "What each process measured, with every timing."),
)
"""The fields of the JSON file, and what they mean, as ``gametalearn bench --help`` prints them."""


def field_of(side: Side) -> str:
    """The name of a side's time in the result.

    >>> field_of("learn2learn-as-shipped")
    'learn2learn_as_shipped_ms'
    """
    return f"{side.replace('-', '_')}_ms"


def figures(rounds: Sequence[Mapping[Side, Record]], errors: Mapping[str, Any]) -> dict[str, Any]:
    """What the records of all rounds, each with every side, amount to.

    Args:
        rounds: for each round, the record of each side.
        errors: the fields of `compare_rows`; may be empty.
    """
    every = {side: [records[side] for records in rounds] for side in SIDES}
    ms = {side: [t for record in records for t in record.ms] for side, records in every.items()}
    by_round = {side: [record.median_ms for record in every[side]] for side in SIDES}
    ours = every["gametalearn"]
    found: dict[str, Any] = {field_of(s): statistics.median(ms[s]) for s in SIDES}
    found |= {f"{field_of(s)}_quartiles": _quartiles(ms[s]) for s in SIDES}
    found |= _ratio("speedup", "learn2learn", found, by_round)
    found |= _ratio("speedup_as_shipped", "learn2learn-as-shipped", found, by_round)
    shares = {side: _largest([r.others_share for r in records]) for side, records in every.items()}
    why = reasons(rounds, shares, errors)
    return found | {
        "ms_by_round": by_round,
        "round_spread": {
            side: (max(own) - min(own)) / found[field_of(side)] for side, own in by_round.items()
        },
        "setup_s": statistics.median(max(0.0, r.first_call_ms - r.median_ms) for r in ours) / 1e3,
        "peak_rss_mb": {
            "gametalearn": max(r.peak_rss_mb for r in ours),
            "learn2learn": max(r.peak_rss_mb for r in every["learn2learn-as-shipped"]),
        },
        **errors,
        "device": ours[0].device,
        "peak_device_mb": None
        if ours[0].peak_device_mb is None
        else {side: max(r.peak_device_mb or 0.0 for r in every[side]) for side in PAIR},
        "plan": ours[0].plan,
        "allocator_keeps_memory": all(
            r.allocator_keeps_memory for r in (*ours, *every["learn2learn"])
        ),
        "others_share": shares,
        "publishable": not why,
        "not_publishable_because": why,
    }


def reasons(
    rounds: Sequence[Mapping[Side, Record]],
    shares: Mapping[Side, float | None],
    errors: Mapping[str, Any],
) -> list[str]:
    """Why figures are not to be published; empty if they may be."""
    why = []
    if len(rounds) < LEAST_ROUNDS:
        why.append(f"fewer than {LEAST_ROUNDS} rounds show no spread between them")
    known = {side: share for side, share in shares.items() if share is not None}
    if len(known) < len(shares):
        why.append("this system does not tell how much CPU time other processes use")
    if known and max(known.values()) > MOST_OTHERS:
        worst = max(known, key=lambda side: known[side])
        why.append(
            f"others used up to {known[worst]:.0%} of the machine's CPU time while {worst} was timed; "
            f"more than {MOST_OTHERS:.0%} disturbs"
        )
    for name in ("float64_rel_error", "float64_rel_error_learn2learn"):
        if not errors.get(name, 0.0) <= EXACT:  # NaN as well
            why.append(f"{name} is {errors[name]:.1e}: not the same meta-gradient is computed")
    said = {w for records in rounds for record in records.values() for w in record.warnings}
    why += sorted(f"it warned: {w}" for w in said)
    return why


def _ratio(
    name: str, other: Side, found: Mapping[str, Any], by_round: Mapping[Side, Sequence[float]]
) -> dict[str, Any]:
    ratio = found[field_of(other)] / found["gametalearn_ms"]
    pairs = zip(by_round[other], by_round["gametalearn"], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    off = max(abs(r - ratio) for r in ratios) if len(ratios) > 1 else None
    return {name: ratio, f"{name}_by_round": ratios, f"{name}_resolution": off}


def _largest(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return max(known) if len(known) == len(shares) else None


def _quartiles(times: Sequence[float]) -> list[float]:
    twice = list(times) * (2 if len(times) == 1 else 1)  # a single one is all three quartiles
    return statistics.quantiles(twice, n=4, method="inclusive")
