"""How far the rows of both sides are from those of a plain loop in float64.

Each side computes its rows in its own process, after it was timed there, and leaves them in a file;
one more process computes the loop and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gametalearn.benchmark.settings import Setting
from gametalearn.benchmark.sides import Side, call_of, rows_of

__all__ = ["COMPARED", "compare_rows", "write_rows"]

COMPARED: tuple[Side, Side] = ("gametalearn", "learn2learn")
KINK = 3e-5
"""Relative float32 error of a row from which on a kink was crossed; without, it is about 3e-6."""


def write_rows(
    folder: Path, side: Side, setting: Setting, batches: int, device: str = "cpu"
) -> None:
    """Leave a side's rows of several batches in a file; of the first one in float64 as well."""

    def rows_in(dtype: torch.dtype, seeds: int) -> list[Tensor]:
        model = setting.model().to(device, dtype)
        calls = (
            call_of(side, setting, model, setting.batch(seed).to(device, dtype))
            for seed in range(seeds)
        )
        return [rows_of(call()).cpu() for call in calls]

    rows, (in_double,) = rows_in(torch.float32, batches), rows_in(torch.float64, 1)
    torch.save({"float32": rows, "float64": in_double}, folder / f"{side}.pt")


def compare_rows(folder: Path, setting: Setting) -> dict[str, Any]:
    """Relative errors of the rows that both sides left, from those of a loop on the CPU.

    Of the batch that is timed as a whole, and over the tasks of several batches. In a few tasks of
    each, rounding moves a number across the kink of a ReLU or a max-pool, on either side: they
    decide the error of a batch. How precise a side is, the median over tasks tells, and the share
    of tasks in which a kink was crossed.
    """
    from gametalearn.gradients import meta_gradients

    files = {side: torch.load(folder / f"{side}.pt", weights_only=True) for side in COMPARED}
    double, learner = setting.model().double(), setting.learner()
    references = [
        meta_gradients(
            double, setting.batch(seed).to(dtype=torch.float64), learner, method="loop"
        ).rows
        for seed in range(len(files[COMPARED[0]]["float32"]))
    ]
    every = {
        side: torch.cat([_by_task(*p) for p in zip(file["float32"], references, strict=True)])
        for side, file in files.items()
    }
    in_double = {s: _by_task(f["float64"], references[0]).max().item() for s, f in files.items()}
    return {
        "float64_rel_error": in_double["gametalearn"],
        "float64_rel_error_learn2learn": in_double["learn2learn"],
        "float32_rel_error": {
            side: _of_batch(file["float32"][0], references[0]) for side, file in files.items()
        },
        "float32_rel_error_median": {side: e.median().item() for side, e in every.items()},
        "float32_kinks_crossed": {
            side: (e > KINK).double().mean().item() for side, e in every.items()
        },
    }


def _by_task(rows: Tensor, reference: Tensor) -> Tensor:
    """The norm of each row's error over that of the row."""
    errors: Tensor = (rows.double() - reference).norm(dim=1) / reference.norm(dim=1)
    return errors


def _of_batch(rows: Tensor, reference: Tensor) -> float:
    return float((rows.double() - reference).norm() / reference.norm())
