"""Timings that were made up, so that no test depends on how fast the machine is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from gametalearn.benchmark.processes import Job
from gametalearn.benchmark.sides import Record, Side

MS: dict[Side, float] = {
    "gametalearn": 100.0,
    "learn2learn": 250.0,
    "learn2learn-as-shipped": 300.0,
    "first-order": 60.0,
    "floor": 80.0,
    "first-order-floor": 50.0,
}
ERRORS = {
    "float64_rel_error": 1e-13,
    "float64_rel_error_learn2learn": 2e-13,
    "float32_rel_error": {"gametalearn": 1e-6, "learn2learn": 2e-6},
    "float32_rel_error_median": {"gametalearn": 1e-6, "learn2learn": 2e-6},
    "float32_kinks_crossed": {"gametalearn": 0.0, "learn2learn": 0.0},
}


def _record(side: Side, *ms: float, **changes: Any) -> Record:
    ms = ms or (MS[side],)
    plan = None if side.startswith("learn2learn") else {"method": "replay"}
    made = Record(
        side=side,
        pid=1,
        median_ms=sorted(ms)[len(ms) // 2],
        ms=list(ms),
        first_call_ms=MS[side] + 2000.0,
        peak_rss_mb=500.0,
        others_share=0.01,
        allocator_keeps_memory=side != "learn2learn-as-shipped",
        inputs="same",
        warnings=[],
        plan=plan,
        device={"name": "cpu"},
        peak_device_mb=None,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def record() -> Callable[..., Record]:
    """``record(side, *ms, **changes)``: a record with these timings, or with a usual one."""
    return _record


class MadeUp:
    """A ``measure=`` that starts no process, and remembers its jobs."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.changes: dict[str, Any] = {}

    def __call__(self, job: Job) -> dict[str, Any]:
        self.jobs.append(job)
        if job.part == "reference":
            return dict(ERRORS)
        return dataclasses.asdict(_record(job.part, **self.changes))


@pytest.fixture
def made_up() -> MadeUp:
    return MadeUp()
