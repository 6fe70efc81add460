"""What is seen of long work off a terminal, and what its time is."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from gametalearn import TrainConfig, compare, progress, train
from gametalearn.checkpoint import load_checkpoint, save_checkpoint
from gametalearn.cli import main
from gametalearn.evaluation import evaluate
from gametalearn.progress import Progress, counting
from gametalearn.run import Parts, start
from tests.support import runs


def tiny(**given: Any) -> TrainConfig:
    return runs.tiny(**{"iterations": 12, "validate_every": 4, **given})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("gametalearn.progress.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at every occasion."""
    monkeypatch.setattr(progress, "EVERY", -1.0)


def test_a_training_says_how_long_it_will_take(clock: list[float], capsys: Any) -> None:
    run = start(tiny(iterations=100), Parts())
    bar = Progress(run, "train", lambda left, whole: f"{left:.0f} of {whole:.0f} s")
    for iteration in (5, 10, 20, 100):
        clock[0] = 1.5 * iteration
        bar.show({"iteration": iteration, "mse": 0.25})
    assert [line.partition("mse 0.25")[2].lstrip("0") for line in said(capsys)] == [
        ", 1.5 s/it, about 2 minutes left; 135 of 150 s",  # at 15 s, and not at 7.5
        ", 1.5 s/it, about 2 minutes left; 120 of 150 s",
        ", 1.5 s/it; 0 of 150 s",
    ]


def said(capsys: Any) -> list[str]:
    lines: list[str] = capsys.readouterr().err.splitlines()
    return lines


def test_episodes_are_counted_now_and_then(clock: list[float], capsys: Any) -> None:
    with counting("test", 100) as tick:
        for second in range(1, 11):
            clock[0] = 3.0 * second
            tick(10)
    assert said(capsys) == [
        "test: 40 of 100 episodes, about 18 s left",
        "test: 80 of 100 episodes, about 6 s left",
    ]
    with counting("test", 100, show=False) as tick:
        clock[0] += 100
        tick(50)
    assert said(capsys) == []


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_shows_each_of_its_steps(jobs: int, tmp_path: Path, capfd: Any) -> None:
    config = tiny(validation_episodes=40, threads=1)
    compare(config, ["uniform", "agreement"], [3], 40, tmp_path, jobs=jobs)
    lines = said(capfd)
    if jobs > 1:  # its processes have their own clock, and ten seconds between lines
        assert any(line.endswith(("it/s; run 2 of 2", "s/it; run 2 of 2")) for line in lines)
        return
    run = "uniform, seed 3: "
    shown = [line.removeprefix(run) for line in lines if line.startswith(run)]
    assert re.fullmatch(
        r"1/12, mse [\d.]+, [\d.]+ (it/s|s/it), about \d+ s left; run 1 of 2, all done in about \d+ s",
        shown[0],
    )
    assert re.fullmatch(r"validation: 16 of 40 episodes, about \d+ s left", shown[3])
    assert any(re.match("test: 32 of 40 episodes, about", line) for line in shown)
    assert any("12/12" in line and "run 2 of 2" in line for line in lines)


@pytest.mark.usefixtures("talkative")
def test_evaluate_shows_how_far_it_is(tmp_path: Path, capsys: Any) -> None:
    train(tiny(), tmp_path / "a", progress=False)
    words = ["evaluate", str(tmp_path / "a"), "--episodes", "40"]
    assert main(words) == 0
    shown = [line.rpartition(", about")[0] for line in said(capsys)]
    label = f"evaluate {tmp_path}/a"
    assert shown == [f"{label}: {n} of 40 episodes" for n in (16, 32)]
    assert main([*words, "--quiet"]) == 0
    assert said(capsys) == []


def test_times_tell_validation_from_training(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(0.5)
        return evaluate(*args, **more)

    monkeypatch.setattr("gametalearn.training.evaluate", slow)
    run = train(tiny(iterations=8), tmp_path / "a", progress=False)  # two validations
    assert 1 < run.elapsed < 60
    assert run.elapsed - run.seconds >= 1
    last = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1]
    seconds = json.loads(last)["seconds"]
    assert seconds["elapsed"] - seconds["total"] >= 1
    first = run.elapsed
    run = train(tiny(iterations=12), tmp_path / "a", progress=False)  # over both sessions
    assert run.elapsed - run.seconds >= 1.5
    assert run.elapsed > first
    assert main(["train", "--resume", str(tmp_path / "a"), "--quiet"]) == 0
    said = capsys.readouterr().out
    told = f"12 iterations in {run.elapsed:.0f} s (training alone: {run.seconds:.0f} s); best"
    assert said.startswith(told)


def test_a_run_of_an_older_version_knows_the_time_of_training_alone(tmp_path: Path) -> None:
    train(tiny(iterations=8), tmp_path / "a", progress=False)
    file = tmp_path / "a" / "checkpoint.pt"
    save_checkpoint(file, {**load_checkpoint(file), "seconds": 100.0})
    run = train(tiny(iterations=12), tmp_path / "a", progress=False)
    assert 100 < run.seconds < run.elapsed < 160


def test_a_comparison_says_what_it_took(tmp_path: Path, capsys: Any) -> None:
    words = "compare --dataset sinusoid --iterations 4 --meta-batch 2 --hidden 4 --seeds 1 --quiet"
    more = ["--validation-episodes", "2", "--episodes", "2", "--out", str(tmp_path)]
    assert main([*words.split(), *more]) == 0
    told = r"\nThis took \d+ s, with validation and tests; training alone, summed over the runs, took \d+ s\.\n"
    assert re.search(told, capsys.readouterr().out)
