"""The whole measurement: every side in a process of its own, in turn, for several rounds."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gametalearn.benchmark.errors import COMPARED
from gametalearn.benchmark.figures import MOST_OTHERS, figures
from gametalearn.benchmark.processes import Job, in_process
from gametalearn.benchmark.settings import (
    CONFIGS,
    ERROR_BATCHES,
    REPEATS,
    USUAL_S,
    Setting,
    check_device,
)
from gametalearn.benchmark.sides import SIDES, Record, Side, missing
from gametalearn.errors import InputError

__all__ = ["AXES", "Measure", "Say", "run_bench", "sweep", "write_json"]

Measure = Callable[[Job], dict[str, Any]]
"""Carries a job out: by default `in_process`."""
Say = Callable[[str], None]
"""Takes a line about what happens."""

AXES = ("tasks", "steps", "shots", "threads")


def run_bench(
    config: str,
    threads: int | None = None,
    json_path: Path | None = None,
    *,
    rounds: int = 3,
    repeats: int | None = None,
    device: str = "cpu",
    setting: Setting | None = None,
    errors: bool = True,
    say: Say | None = None,
    measure: Measure = in_process,
) -> dict[str, Any]:
    """Time one meta-gradient on every side, each in a process of its own, in turn.

    Args:
        config: a name in `CONFIGS`.
        threads: PyTorch threads of every process; PyTorch's own choice by default.
        json_path: where to write the result.
        rounds: processes of each side; with fewer than 3 the result is not publishable.
        repeats: timings of each process; by default as many as make the median steady.
        device: what every side is computed on: ``"cpu"``, ``"cuda"`` or one of several GPUs.
        setting: a variation, in place of ``CONFIGS[config]``.
        errors: also compare the rows of both sides with a float64 loop.
        say: is told of each process before it starts.
        measure: what carries a job out.

    Returns:
        The fields of `gametalearn.benchmark.figures.FIELDS`; without ``errors`` those about errors
        are missing.

    Raises:
        InputError: an argument is out of range, there is no such device, learn2learn is missing, or
            a process failed.
    """
    if config not in CONFIGS:
        raise InputError(f"bench: config must be one of {', '.join(CONFIGS)}; got '{config}'")
    for name, value in (("threads", threads), ("rounds", rounds), ("repeats", repeats)):
        if value is not None and value < 1:
            raise InputError(f"bench: {name} must be at least 1, got {value}")
    check_device(device)
    if importlib.util.find_spec("learn2learn") is None:
        raise missing(ModuleNotFoundError("No module named 'learn2learn'"))
    job = Job(
        "gametalearn",
        config,
        CONFIGS[config] if setting is None else setting,
        torch.get_num_threads() if threads is None else threads,
        REPEATS[config] if repeats is None else repeats,
        batches=ERROR_BATCHES[config],
        device=device,
    )
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        records, found = _in_turn(job, rounds, Path(folder) if errors else None, say, measure)
    _same_inputs(records)
    result: dict[str, Any] = _rounded(
        {
            "config": config,
            "threads": job.threads,
            "rounds": rounds,
            "repeats": job.repeats,
            **figures(records, found),
            "setting": dataclasses.asdict(job.setting),
            "machine": about,
            "processes": [
                {"round": number, **dataclasses.asdict(record)}
                for number, of_round in enumerate(records, 1)
                for record in of_round.values()
            ],
        }
    )
    if json_path is not None:
        write_json(json_path, result)
    return result


def _in_turn(
    job: Job, rounds: int, folder: Path | None, say: Say | None, measure: Measure
) -> tuple[list[dict[Side, Record]], dict[str, Any]]:
    """The records of each round, and the errors if there is a folder for rows."""
    records: list[dict[Side, Record]] = [{} for _ in range(rounds)]
    found: dict[str, Any] = {}
    plan = [
        (i, dataclasses.replace(job, part=side, rows=folder if i == 0 and side in COMPARED else None))
        for i in range(rounds)
        for side in SIDES
    ]  # fmt: skip
    if folder is not None:
        plan.append((rounds - 1, dataclasses.replace(job, part="reference", rows=folder)))
    taken: list[tuple[str, float]] = []
    warned = False
    for done, (i, own) in enumerate(plan):
        if say is not None:
            turn = "errors" if own.part == "reference" else f"{own.part}, round {i + 1} of {rounds}"
            left = seconds_left(taken, [o.part for _, o in plan[done:]], USUAL_S[job.config])
            say(f"bench: {turn} (process {done + 1} of {len(plan)}); {_about(left)} left")
        start = time.perf_counter()
        answer = measure(own)
        taken.append((own.part, time.perf_counter() - start))
        if own.part == "reference":
            found = answer
        else:
            record = records[i][own.part] = Record(**answer)
            if say is not None and not warned and (record.others_share or 0.0) > MOST_OTHERS:
                say(
                    f"bench: others use {record.others_share:.0%} of the machine's CPU time, so that "
                    "these figures will not be publishable; better start again when it is idle"
                )
                warned = True
    return records, found


def _same_inputs(records: Sequence[dict[Side, Record]]) -> None:
    if len({record.inputs for of_round in records for record in of_round.values()}) > 1:
        raise InputError(
            "bench: the processes did not get the same weights and batch from the same seed; "
            "their times cannot be compared"
        )


def seconds_left(taken: Sequence[tuple[str, float]], waiting: Sequence[str], usual: float) -> float:
    """How long the waiting processes will take, by what those before them have taken.

    Args:
        taken: name and seconds of those before.
        waiting: names of those to come.
        usual: seconds of a process, as long as none is known.
    """
    of_all = statistics.mean(s for _, s in taken) if taken else usual
    own = {name: statistics.mean(s for other, s in taken if other == name) for name, _ in taken}
    return sum(own.get(name, of_all) for name in waiting)


def _about(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def write_json(path: Path, result: Any) -> None:
    """Write a result, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def sweep(
    config: str,
    axis: str,
    values: Iterable[int],
    threads: int | None = None,
    *,
    rounds: int = 3,
    repeats: int | None = None,
    device: str = "cpu",
    say: Say | None = None,
    measure: Measure = in_process,
    **changes: Any,
) -> list[dict[str, Any]]:
    """`run_bench` of a config, with ``changes``, while one of tasks, steps, shots or threads varies.

    Each result has ``axis`` and ``value`` besides the fields of `run_bench`; without errors.
    """
    if axis not in AXES:
        raise InputError(f"bench: --sweep must be one of {', '.join(AXES)}; got '{axis}'")
    results = []
    for value in values:
        if say is not None:
            say(f"bench: {axis} {value}")
        varied = {} if axis == "threads" else {axis: value}
        setting = dataclasses.replace(CONFIGS[config], **{**changes, **varied})
        result = run_bench(
            config,
            value if axis == "threads" else threads,
            rounds=rounds,
            repeats=repeats,
            device=device,
            setting=setting,
            errors=False,
            say=say,
            measure=measure,
        )
        results.append({"axis": axis, "value": value, **result})
    return results
