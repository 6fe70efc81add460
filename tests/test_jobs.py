"""A comparison as commands: they give its settings, and what they leave is collected."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gametalearn
from gametalearn.cli import main
from gametalearn.config import TrainConfig
from gametalearn.jobs import commands_of, place_of, runs_of
from tests.support.runs import untimed

ROOT = Path(gametalearn.__file__).parents[1]

CONFIGS = [
    TrainConfig.of("sinusoid", threads=1),
    TrainConfig.of("glyphs", threads=2, iterations=300, validate_every=7, norm="group", seed=3),
    TrainConfig.of("omniglot", threads=1, rotations=False, split="maml", ways=20, meta_lr=1e-05),
    TrainConfig.of("glyphs", threads=1, learner="maml", learned_rates=True, meta_lr_final=1e-4),
    TrainConfig.of("folder:/a b/it's $HOME", threads=1, shots=5, clip_norm=0.25, device="cpu"),
    TrainConfig.of(
        "glyphs", threads=1, learner="reptile", inner_optimizer="adam", inner_batch=10, shots=10
    ),
    TrainConfig.of("sinusoid", threads=1, constant_memory=True, learner="metasgd", shared="net.0"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "dwa": {"period": 7, "temperature": 0.5},
    "gradnorm": {"alpha": 1e-09, "optimizer": "sgd", "lr": 1},
    "torchjd:CAGrad": {"c": 0.5, "text": "10", "odd": "a 'b' \"c\"", "many": [1, 2.5], "on": True},
}


def planned(config: TrainConfig, rules: list[str], folder: Path) -> list[Any]:
    """Without a look at the data, which most of these data sets lack here."""
    from gametalearn.jobs import Planned

    return [Planned(r, config.of_rule(r, 3), place_of(folder, r, 3)) for r in rules]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.dataset}-{c.learner}")
def test_a_command_gives_the_settings_of_its_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def train(own: TrainConfig, out: Path, **more: Any) -> None:
        found.append((own, out, more["overwrite"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("gametalearn.training.train", train)
    config = TrainConfig(**{**config.as_dict(), "rule_options": OPTIONS})
    runs = planned(config, ["uniform", *OPTIONS], tmp_path / "a b" / "it's")
    for run, command in zip(runs, commands_of(runs, overwrite=True), strict=True):
        assert "\n" not in command
        program, *words = shlex.split(command)
        assert program == "gametalearn"
        assert main(words) == 130
        assert found.pop() == (run.config, run.place, True)


def test_seed_by_seed_and_nothing_that_is_a_default(tmp_path: Path) -> None:
    runs = runs_of(
        TrainConfig.of("sinusoid", threads=1),
        {r: r for r in ("uniform", "agreement")},
        (0, 4),
        tmp_path,
    )
    assert [run.label for run in runs] == [
        "uniform, seed 0", "agreement, seed 0", "uniform, seed 4", "agreement, seed 4"
    ]  # fmt: skip
    assert commands_of(runs)[3] == (
        "gametalearn train --dataset sinusoid --rule agreement --iterations 20000 --seed 4 "
        f"--threads 1 --out {tmp_path}/agreement/seed4"
    )


REAL = f'exec "{sys.executable}" -m gametalearn "$@"'
ECHO = """printf '<%s>' "$@" """


def program(command: str) -> None:
    script = Path("bin/gametalearn")
    script.write_text(f"#!/bin/sh\n{command}\n")
    script.chmod(0o755)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with a place for a `gametalearn` that is on the path."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = "compare --dataset sinusoid --iterations 4 --meta-batch 2 --hidden 8 --validation-episodes 3"
TINY += " --rules uniform,agreement --seeds 1 --episodes 5 --threads 1 --quiet"


def plan_of(capsys: Any, out: str) -> str:
    assert main([*TINY.split(), "--out", out, "--plan"]) == 0
    text: str = capsys.readouterr().out
    assert not Path(out).exists()
    return text


def test_planned_runs_are_collected_and_equal_a_comparison(shell: Path, capsys: Any) -> None:
    program(REAL)
    plan = plan_of(capsys, "a")
    command = ["xargs", "-P", "2", "-I{}", "sh", "-c", "{}"]
    subprocess.run(command, input=plan, text=True, check=True, capture_output=True)
    trained = {p: p.stat().st_mtime_ns for p in Path("a").rglob("checkpoint.pt")}
    assert len(trained) == 2
    assert main([*TINY.split(), "--out", "a"]) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in trained.items())
    assert main([*TINY.split(), "--out", "b"]) == 0
    assert untimed(Path("a")) == untimed(Path("b"))
    capsys.readouterr()
    assert main([*TINY.split(), "--inner-lr", "0.5", "--out", "a"]) == 2  # what does not fit
    assert "other settings (inner_lr 0.01, not 0.5)" in capsys.readouterr().err


def test_words_that_a_shell_would_take_apart(shell: Path, capsys: Any) -> None:
    program(ECHO)
    assert main([*TINY.split(), "--out", "a 'b'", "--plan"]) == 0
    said = capsys.readouterr()
    assert "xargs -0 -n 1 sh -c" in said.err
    command = "tr '\\n' '\\0' | xargs -0 -n 1 sh -c"
    done = subprocess.run(
        ["sh", "-c", command], input=said.out, text=True, capture_output=True, check=True
    )
    assert done.stdout.count("<train><--dataset><sinusoid>") == 2
    assert done.stdout.endswith("<--out><a 'b'/agreement/seed0>")


def test_the_script_for_a_slurm_array(shell: Path, capsys: Any) -> None:
    program(ECHO)
    (shell / "plan.txt").write_text(plan_of(capsys, "a"))
    script = ROOT / "examples" / "slurm_array.sh"
    bash = shutil.which("bash")
    assert bash

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [bash, script, "plan.txt"], env={**os.environ, **more}, capture_output=True, text=True
        )

    done = run(SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("<--out><a/agreement/seed0>")
    assert "has no line 3" in run(SLURM_ARRAY_TASK_ID="3").stderr
    assert "sbatch --array" in run().stderr


def test_what_fails_in_a_process_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In terms of flags on the command line."""
    flags = "--dataset sinusoid --iterations 2 --meta-batch 2 --hidden 4 --validation-episodes 2 "
    flags += "--inner-lr 1e9 --inner-steps 9 --quiet --seeds 1 --jobs 2 --rules uniform,agreement"
    assert main(["compare", *flags.split(), "--out", str(tmp_path / "a")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"gametalearn: (uniform|agreement), seed 0: iteration 1: loss or gradient of task 0", line
    )
    assert "lower --inner-lr or --meta-lr" in line


TWO = """
import multiprocessing, os, pathlib, signal, sys, threading, time
from gametalearn import InputError, Sinusoid, TrainConfig, compare

out, interrupted = pathlib.Path(sys.argv[1]), len(sys.argv) > 2

def tests(seed):
    if multiprocessing.parent_process() is not None:
        if seed == 0 and not interrupted:
            raise InputError("this one fails")
        if seed == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that comes too late to end the run
            (out / "begun").touch()
            time.sleep(5)
    return Sinusoid(seed=3)

def stop():
    while not (out / "begun").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    config = TrainConfig.of("sinusoid", iterations=1, meta_batch=2, hidden=4, validation_episodes=2)
    out.mkdir()
    if interrupted:
        threading.Thread(target=stop, daemon=True).start()
    try:
        compare(config, ["uniform"], [1, 0], 2, out, jobs=2, test=tests, progress=False)
    except InputError as error:
        print(error)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_worker_that_cannot_be_ended_in_its_run_ends_after_it(
    tmp_path: Path, interrupted: bool
) -> None:
    """On Ctrl-C; and another run that fails does not end it at all."""
    program = tmp_path / "program.py"
    program.write_text(TWO)
    done = subprocess.run(
        [sys.executable, program, tmp_path / "out", *["interrupted"] * interrupted],
        capture_output=True,
        text=True,
        timeout=300,
    )
    wanted = "interrupted\n" if interrupted else f"uniform, seed 0: this one fails; {KEPT}\n"
    assert done.stdout == wanted, done.stderr
    assert (tmp_path / "out" / "uniform" / "seed1" / "evaluation.json").exists()


KEPT = "the other runs are finished and kept: the same command without the rule reports them"


FAILING = """
from gametalearn import InputError, Uniform

class Rule:
    count = 0

    def __call__(self, gradients):
        self.count += 1
        if self.count == 2:
            raise InputError("this rule fails")
        return Uniform()(gradients)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_rule_that_fails_leaves_the_others_to_be_reported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    jobs: int,
) -> None:
    (tmp_path / f"failing{jobs}.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    flags = "--dataset sinusoid --iterations 2 --meta-batch 2 --hidden 4 --validation-episodes 2 "
    flags += (
        f"--episodes 2 --quiet --seeds 2 --threads 1 --jobs {jobs} --out {tmp_path / 'a'} --rules"
    )
    rules = f"uniform,failing{jobs}:Rule,agreement"
    assert main(["compare", *flags.split(), rules]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    failing = f"failing{jobs}:Rule, seed"
    assert line == (
        f"gametalearn: {failing} 0: this rule fails; failed as well: {failing} 1; {KEPT}"
    )
    runs = [Path("a") / rule / f"seed{s}" for rule in ("uniform", "agreement") for s in (0, 1)]
    before = [(run / "metrics.jsonl").read_text() for run in runs]
    assert main(["compare", *flags.split(), "uniform,agreement"]) == 0
    # nothing was trained again
    assert [(run / "metrics.jsonl").read_text() for run in runs] == before
