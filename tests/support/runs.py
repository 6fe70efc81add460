"""Small runs, and what is the same in two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gametalearn import TrainConfig
from gametalearn.checkpoint import load_checkpoint

__all__ = ["assert_equal", "assert_same_run", "lines", "tiny", "untimed", "weights"]


def tiny(**given: Any) -> TrainConfig:
    """Six iterations of sinusoid regression; a line of the log for each."""
    settings: dict[str, Any] = {"iterations": 6, "meta_batch": 4, "hidden": 8, "log_every": 1}
    settings |= {"validation_episodes": 4, "validate_every": 3, "checkpoint_every": 2}
    return TrainConfig.of("sinusoid", **{**settings, **given})


def lines(folder: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without its timings."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def weights(folder: Path, file: str = "checkpoint.pt") -> dict[str, Tensor]:
    """The meta-parameters that a run's file holds."""
    found: dict[str, Tensor] = load_checkpoint(folder / file)["meta"]
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs have the same log and, bit for bit, the same latest and best weights."""
    assert lines(one) == lines(other)
    for file in ("checkpoint.pt", "best.pt"):
        first, second = weights(one, file), weights(other, file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def assert_equal(a: Any, b: Any) -> None:
    """Two states, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def untimed(folder: Path) -> dict[str, Any]:
    """``results.json`` without its timings and the command that wrote it."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for rule in found["rules"].values():
        for seed in rule["seeds"]:
            del seed["seconds"]
    del found["environment"]["command"]
    return found
