"""Both sides get the same and compute the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from gametalearn import meta_gradients
from gametalearn.benchmark import CONFIGS, Setting, sides
from gametalearn.benchmark.errors import compare_rows, write_rows
from gametalearn.benchmark.load import Reading
from gametalearn.benchmark.settings import digest
from gametalearn.benchmark.sides import WARM_CALLS, call_of, rows_of, timings, wait_for

SMALL = Setting(tasks=2, ways=3, steps=2, image_size=16, hidden=4)


def test_the_configs_are_those_that_are_published() -> None:
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
    ours, theirs = (
        rows_of(call_of(side, SMALL, model, batch)()) for side in ("gametalearn", "learn2learn")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_first_order_is_first_order() -> None:
    model, batch = SMALL.model().double(), SMALL.batch().to(dtype=torch.float64)
    learner = dataclasses.replace(SMALL.learner(), first_order=True)
    expected = meta_gradients(model, batch, learner, method="loop").rows
    torch.testing.assert_close(call_of("first-order", SMALL, model, batch)(), expected)


def test_the_digest_sees_weights_and_every_part_of_the_batch() -> None:
    model, batch = SMALL.model(), SMALL.batch()
    found = [digest(model, batch), digest(model, SMALL.batch(seed=1))]
    found += [
        digest(model, dataclasses.replace(batch, **{name: getattr(batch, name) + 1}))
        for name in ("support_x", "support_y", "query_x", "query_y")
    ]
    with torch.no_grad():
        list(model.parameters())[-1][-1] += 1e-6
    found.append(digest(model, batch))
    assert len(set(found)) == len(found)
    assert digest(SMALL.model(), SMALL.batch()) == found[0]


def test_the_first_call_and_the_warm_up_are_not_among_the_timings() -> None:
    calls: list[int] = []
    _, ms, _ = timings(lambda: calls.append(1), repeats=4, warm_s=0.0)
    assert len(ms) == 4
    assert len(calls) == 1 + WARM_CALLS + 4


def test_a_timing_begins_and_ends_with_a_device_that_has_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)

    def clock() -> float:
        done.append("clock")
        return float(len(done))

    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.setattr(sides, "read", lambda: Reading(0.0, 0.0, None, 1))
    timings(lambda: done.append("call"), 2, 0.0, wait_for("cuda:1"))
    timed, warm = ["cuda:1", "clock", "call", "cuda:1", "clock"], ["call", "cuda:1"]
    assert [x for x in done if x != "clock"] == [
        *("cuda:1", "call", "cuda:1"), *warm * WARM_CALLS, *("cuda:1", "call", "cuda:1") * 2
    ]  # fmt: skip
    assert done[:5] == done[-10:-5] == done[-5:] == timed
    done.clear()
    wait_for("cpu")()
    assert done == []


def test_errors_are_those_of_the_rows_that_were_left(tmp_path: Path) -> None:
    for side in ("gametalearn", "learn2learn"):
        write_rows(tmp_path, side, SMALL, batches=2)
    exact = compare_rows(tmp_path, SMALL)
    assert max(exact["float64_rel_error"], exact["float64_rel_error_learn2learn"]) < 1e-9
    assert all(0 < e < 1e-2 for e in exact["float32_rel_error"].values())
    file = torch.load(tmp_path / "gametalearn.pt", weights_only=True)
    assert len(file["float32"]) == 2
    file["float64"][0] *= 1.5  # one task of two
    file["float32"][0] *= 3.0  # the first batch of two
    torch.save(file, tmp_path / "gametalearn.pt")
    wrong = compare_rows(tmp_path, SMALL)
    assert wrong["float64_rel_error"] == pytest.approx(0.5)
    assert wrong["float64_rel_error_learn2learn"] == exact["float64_rel_error_learn2learn"]
    assert wrong["float32_rel_error"]["gametalearn"] == pytest.approx(2.0, rel=1e-2)
    assert wrong["float32_kinks_crossed"]["gametalearn"] >= 0.5
    theirs = exact["float32_kinks_crossed"]["learn2learn"]
    assert wrong["float32_kinks_crossed"]["learn2learn"] == theirs
