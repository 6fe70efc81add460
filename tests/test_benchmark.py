"""The benchmark measures the same thing on both sides, and writes the fields that are promised."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gametalearn import InputError, benchmark
from gametalearn.benchmark import CONFIGS, Setting, run_bench
from gametalearn.cli import main

SMALL = Setting(tasks=2, ways=3, steps=2, image_size=16, hidden=4)
FIELDS = {
    "config",
    "threads",
    "gametalearn_ms",
    "learn2learn_ms",
    "speedup",
    "learn2learn_as_shipped_ms",
    "speedup_as_shipped",
    "float64_rel_error",
    "float32_rel_error",
    "setup_s",
    "peak_rss_mb",
}


@pytest.fixture(autouse=True)
def learn2learn() -> None:
    benchmark.learn2learn_gradient(SMALL, SMALL.model(), SMALL.batch())


def test_the_configs_are_those_of_the_design() -> None:
    omniglot = CONFIGS["omniglot-5w1s"]
    assert (omniglot.tasks, omniglot.ways, omniglot.shots, omniglot.queries) == (16, 5, 1, 1)
    assert (omniglot.steps, omniglot.hidden, omniglot.pool) == (1, 64, "stride")
    assert CONFIGS["omniglot-5w1s-q15"] == dataclasses.replace(omniglot, queries=15)
    mini = CONFIGS["mini-imagenet-5w1s"]
    assert (mini.tasks, mini.ways, mini.shots, mini.queries, mini.steps) == (4, 5, 1, 15, 5)
    assert (mini.channels, mini.image_size, mini.hidden, mini.pool) == (3, 84, 32, "max")
    assert not any(c.first_order for c in CONFIGS.values())


def test_both_sides_compute_the_same_rows() -> None:
    model, batch = SMALL.model().double(), SMALL.batch().to(dtype=torch.float64)
    theirs = torch.stack(benchmark.learn2learn_gradient(SMALL, model, batch)())
    torch.testing.assert_close(
        benchmark._ours(SMALL, model, batch)(), theirs, rtol=1e-9, atol=1e-12
    )


def test_fields_and_errors(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "bench.json"
    result = run_bench("omniglot-5w1s", 1, file, repeats=2, setting=SMALL)
    assert set(result) >= FIELDS
    assert json.loads(file.read_text()) == result
    assert result["config"] == "omniglot-5w1s"
    assert result["threads"] == 1
    assert result["speedup"] == pytest.approx(
        result["learn2learn_ms"] / result["gametalearn_ms"], rel=1e-2
    )
    assert result["float64_rel_error"] < 1e-9
    assert set(result["float32_rel_error"]) == {"gametalearn", "learn2learn"}
    assert all(e < 1e-2 for e in result["float32_rel_error"].values())
    assert set(result["peak_rss_mb"]) == {"gametalearn", "learn2learn"}
    assert 0 < result["floor_ms"] < result["gametalearn_ms"] * 1.5
    assert 0 < result["first_order_floor_ms"] < result["first_order_ms"] * 1.5
    assert "times slower" in benchmark.summary(result)


def test_a_sweep_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"ms": 1.0, "rss_mb": 2.0}
    monkeypatch.setattr(benchmark, "_alone", lambda *_: alone)
    monkeypatch.setitem(benchmark.CONFIGS, "omniglot-5w1s", SMALL)
    monkeypatch.setitem(benchmark.SWEEP_VALUES, "tasks", (1, 3))
    file = tmp_path / "sweep.json"
    assert main(["bench", "--sweep", "tasks", "--repeats", "1", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert [r["value"] for r in results] == [1, 3]
    assert [r["setting"]["tasks"] for r in results] == [1, 3]
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"config must be one of omniglot-5w1s, .*; got 'cifar'"):
        run_bench("cifar")
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        run_bench("omniglot-5w1s", 0)
    with pytest.raises(InputError, match=r"--sweep must be one of tasks, .*; got 'ways'"):
        benchmark.sweep("omniglot-5w1s", "ways", [1])
    assert main(["bench", "--config", "cifar"]) == 2
