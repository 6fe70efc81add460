"""What a comparison shows while it trains."""

from __future__ import annotations

import dataclasses
import io
import pickle

import numpy as np
import pytest

from gametalearn.evaluation import Evaluation
from gametalearn.live import Standing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def accuracy(value: float) -> Evaluation:
    return Evaluation(np.full(3, value), np.zeros(3, dtype=np.int64), "accuracy", "transductive", 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("gametalearn.live.time.monotonic", lambda: now[0])
    return now


def run(standing: Standing, clock: list[float], rule: str, seed: int, value: float) -> None:
    standing.begin(rule, seed)
    clock[0] += 60.0
    standing.end(rule, seed, accuracy(value))
    standing.end(rule, seed, accuracy(0.0))  # told twice


RULES = ("uniform", "agreement")


def test_elsewhere_a_line_for_each_run(clock: list[float]) -> None:
    stream = io.StringIO()
    standing = Standing(RULES, (0, 7), "uniform", stream=stream)
    run(standing, clock, "uniform", 0, 0.5)
    run(standing, clock, "agreement", 0, 0.475)
    run(standing, clock, "uniform", 7, 0.6)
    run(standing, clock, "agreement", 7, 0.625)
    assert stream.getvalue().splitlines() == [
        "uniform, seed 0: test accuracy % 50.00; 1 of 4 runs done, about 3 minutes left",
        "agreement, seed 0: test accuracy % 47.50; minus uniform so far -2.50 (1 seed); "
        "2 of 4 runs done, about 2 minutes left",
        "uniform, seed 7: test accuracy % 60.00; 3 of 4 runs done, about 60 s left",
        "agreement, seed 7: test accuracy % 62.50; minus uniform so far +0.00 (2 seeds); "
        "4 of 4 runs done",
    ]


def test_what_was_there_takes_no_time_and_jobs_share_it(clock: list[float]) -> None:
    stream = io.StringIO()
    there = [("uniform", 0), ("agreement", 0)]
    standing = Standing(RULES, (0, 1, 2), "uniform", there=there, jobs=2, stream=stream)
    run(standing, clock, "uniform", 0, 0.5)
    assert stream.getvalue() == ""
    run(standing, clock, "uniform", 1, 0.5)  # three new ones are left, in two rounds
    assert stream.getvalue().endswith("2 of 6 runs done, about 2 minutes left\n")


def test_a_run_says_which_it_is_and_when_all_are_done(clock: list[float]) -> None:
    """By its own pace, until one has been trained and tested."""
    standing = Standing(RULES, (0, 1, 2), "uniform", there=[("agreement", 2)], stream=io.StringIO())
    first = standing.begin("uniform", 0)
    assert first(30, 40) == "run 2 of 6, all done in about 3 minutes"  # 30 + 4 * 40
    clock[0] += 100.0
    standing.end("uniform", 0, accuracy(0.5))
    second = standing.begin("agreement", 0)
    assert second(30, 40) == "run 3 of 6, all done in about 6 minutes"  # 30 + 3 * 100
    assert pickle.loads(pickle.dumps(second)) == second  # to a process of its own
    assert dataclasses.replace(second, jobs=2)(30, 40).endswith("about 4 minutes")  # 30 + 2 * 100
    assert dataclasses.replace(second, number=6, waiting=0)(5, 40).endswith("all done in about 5 s")
    assert dataclasses.replace(second, number=6, waiting=0)(0, 40) == "run 6 of 6"


def test_a_terminal_has_a_table_that_is_drawn_anew(clock: list[float]) -> None:
    stream = Terminal()
    standing = Standing(RULES, (0, 1), "uniform", stream=stream)
    assert "\x1b" not in stream.getvalue()
    assert "how long it will take is known after the first" in stream.getvalue()
    run(standing, clock, "uniform", 0, 0.5)
    run(standing, clock, "agreement", 0, 0.4)
    *_, last = stream.getvalue().split("\x1b[5F\x1b[J")
    lines = last.splitlines()
    assert lines[0].split("  ")[0] == "rule"
    assert lines[2].split() == ["uniform", "1", "of", "2", "50.00"]
    assert lines[3].split() == ["agreement", "1", "of", "2", "40.00", "-10.00", "(1", "seed)"]
    assert lines[4] == "2 of 4 runs done, about 2 minutes left"
    assert len(lines) == 5


def test_several_jobs_and_silence_redraw_nothing() -> None:
    for more in ({"jobs": 2}, {"show": False}):
        stream = Terminal()
        Standing(RULES, (0,), "uniform", stream=stream, **more)
        assert stream.getvalue() == ""
