"""What may change when a run goes on: longer runs, other intervals, another machine."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gametalearn import InputError, TrainConfig, compare, load_run, train
from gametalearn.checkpoint import load_checkpoint
from gametalearn.cli import main
from gametalearn.config import RESUMABLE
from gametalearn.gradients import meta_gradients
from gametalearn.settings import read_toml
from tests.support import runs
from tests.support.runs import assert_equal, assert_same_run, lines

TINY = "--dataset sinusoid --iterations 8 --meta-batch 2 --hidden 4 --validation-episodes 2 "
TINY += "--validate-every 4 --log-every 2 --threads 1 --quiet"


def tiny(**given: Any) -> TrainConfig:
    settings = {"iterations": 12, "meta_batch": 3, "validate_every": 4, "checkpoint_every": 5}
    return runs.tiny(**{**settings, **given})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of 8 iterations."""
    assert main(["train", *TINY.split(), "--out", str(tmp_path / "a")]) == 0
    return tmp_path / "a"


def resumed(run: Path, flags: str) -> int:
    return main(["train", "--resume", str(run), *flags.split(), "--quiet"])


def settings(run: Path) -> dict[str, Any]:
    return read_toml(run / "config.toml")


# ---------------------------------------------------------------------------------------------
# which flags there may be


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ways 20", "--ways 20: {run} was started with 1, which cannot change within a run"),
        ("--rule agreement", "--rule agreement: {run} was started with uniform"),
        ("--inner-lr 0.5", "--inner-lr 0.5: {run} was started with 0.01"),
        ("--seed 3", "--seed 3: {run} was started with 0"),
        ("--split lake", "--split lake: {run} was started with none"),
        ("--rule-options dwa.period=3", "was started with none"),
        ("--dataset glyphs", "--dataset glyphs: the run was trained on sinusoid"),
        ("--out elsewhere", "writes to that folder; leave out --out elsewhere"),
        ("--overwrite", "--resume continues a run and --overwrite starts over"),
        ("--config {file}", "--shots 3: {run} was started with 10"),
        ("--threads x", "invalid int value"),
        ("--log-every 0", "--log-every must be at least 1"),
    ],
)
def test_a_flag_that_cannot_apply_is_refused(
    flags: str, message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished.parent / "c.toml"
    file.write_text("shots = 3\n")
    before = {f.name: f.read_bytes() for f in finished.iterdir()}
    capsys.readouterr()
    assert resumed(finished, flags.format(file=file)) == 2
    said = capsys.readouterr().err
    assert message.format(run=finished) in said
    assert said.count("\n") == 1
    assert {f.name: f.read_bytes() for f in finished.iterdir()} == before


def test_what_may_change_is_told_where_something_else_is_given(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(finished, "--ways 20") == 2
    assert (
        "leave it out (--iterations, --log-every, --log-matrices, --validate-every, "
        "--checkpoint-every, --keep-every, --device, --threads may change)"
    ) in capsys.readouterr().err
    assert set(RESUMABLE) == {
        *("iterations", "threads", "device", "log_every", "log_matrices"),
        *("checkpoint_every", "keep_every", "validate_every"),
    }
    assert main(["train", "--help"]) == 0
    assert "--checkpoint-every, --keep-every, --device, --threads. More" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_a_run_has_anyway_may_be_repeated(finished: Path) -> None:
    """As by the file of settings that it was started with."""
    file = finished / "config.toml"
    assert resumed(finished, f"--config {file} --dataset sinusoid --rule uniform --shots 10") == 0


def test_trust_without_resume_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY.split(), "--trust", "--out", str(tmp_path / "a")]) == 2
    assert "--trust needs --resume RUN" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------
# longer runs


@pytest.mark.parametrize(
    "given",
    [
        {"rule": "agreement", "learner": "metasgd"},
        {"rule": "dwa", "rule_options": {"dwa": {"period": 3}}, "meta_optimizer": "sgd"},
        {"multi_step_loss": 3, "inner_steps": 2, "first_order_until": 14, "disagree": 0.3},
    ],
    ids=["agreement", "dwa", "annealed"],
)
def test_an_extended_run_is_the_longer_one_bit_for_bit(
    given: dict[str, Any], tmp_path: Path
) -> None:
    short = tiny(threads=1, **given)  # 12 iterations, validated every 4
    long = dataclasses.replace(short, iterations=24)
    train(long, tmp_path / "whole", progress=False)
    train(short, tmp_path / "parts", progress=False)
    run = train(long, tmp_path / "parts", progress=False)
    assert (run.iteration, run.config) == (24, long)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for content in (a, b):
        del content["seconds"], content["metrics_bytes"]
    assert_equal(a, b)


def test_by_the_command_line_the_validation_interval_stays(finished: Path) -> None:
    """Which is a tenth of the length where it is not given."""
    assert resumed(finished, "--iterations 16") == 0
    assert (settings(finished)["iterations"], settings(finished)["validate_every"]) == (16, 4)
    validated = [r["iteration"] for r in lines(finished) if "validation" in r]
    assert validated == [4, 8, 12, 16]
    whole = finished.parent / "whole"
    words = TINY.replace("--iterations 8", "--iterations 16")
    assert main(["train", *words.split(), "--out", str(whole)]) == 0
    assert_same_run(finished, whole)
    # the same train --out once more, with more iterations, is as good
    words = TINY.replace("--iterations 8 ", "--iterations 20 ").replace("--validate-every 4", "")
    assert main(["train", *words.split(), "--out", str(finished)]) == 0
    assert (settings(finished)["iterations"], settings(finished)["validate_every"]) == (20, 4)
    # and without a number of its own, what the run has
    words = TINY.replace("--iterations 8 ", "").replace("--log-every 2", "")
    assert main(["train", *words.split(), "--out", str(finished)]) == 0
    assert (settings(finished)["iterations"], settings(finished)["log_every"]) == (20, 2)


def test_the_last_validation_of_the_shorter_run_is_one_more(tmp_path: Path) -> None:
    """Where the interval does not divide its length; the weights are those of the longer run."""
    long = tiny(iterations=20, validate_every=8)
    whole = train(long, tmp_path / "whole", progress=False)
    train(dataclasses.replace(long, iterations=10), tmp_path / "parts", progress=False)
    parts = train(long, tmp_path / "parts", progress=False)
    assert all(torch.equal(p, parts.meta[name]) for name, p in whole.meta.items())
    one, other = (
        [r["iteration"] for r in lines(tmp_path / name) if "validation" in r]
        for name in ("whole", "parts")
    )
    assert (one, other) == ([8, 16, 20], [8, 10, 16, 20])


def test_an_interrupted_run_may_get_another_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in (5, 21):
            os.kill(os.getpid(), signal.SIGINT)
        return meta_gradients(*args, **kwargs)

    monkeypatch.setattr("gametalearn.training.meta_gradients", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "a", progress=False)
    train(tiny(iterations=8), tmp_path / "a", progress=False)
    train(tiny(iterations=8), tmp_path / "b", progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert len(calls) == 16
    # what died before it wrote anything can also go back
    (tmp_path / "a" / "config.toml").write_text(
        (tmp_path / "a" / "config.toml").read_text().replace("iterations = 8", "iterations = 30")
    )
    assert train(tiny(iterations=8), tmp_path / "a", progress=False).iteration == 8
    assert settings(tmp_path / "a")["iterations"] == 8


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_is_not_stretched(
    schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(meta_schedule=schedule)
    train(config, tmp_path / "a", progress=False)
    before = {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    wanted = f"follows `meta_schedule` {schedule} over 12 iterations, so that a longer or shorter"
    with pytest.raises(InputError, match=wanted):
        train(dataclasses.replace(config, iterations=24), tmp_path / "a", progress=False)
    assert resumed(tmp_path / "a", "--iterations 24") == 2
    assert f"--iterations 24: the outer rate of {tmp_path}/a" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == before
    train(config, tmp_path / "a", progress=False)


def test_an_optimiser_of_ones_own_has_no_schedule_in_its_way(tmp_path: Path) -> None:
    def plain(named: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], lr=1e-3)

    config = tiny(meta_schedule="cosine")
    train(config, tmp_path / "a", progress=False, optimizer=plain)
    long = dataclasses.replace(config, iterations=24)
    parts = train(long, tmp_path / "a", progress=False, optimizer=plain)
    whole = train(long, progress=False, optimizer=plain)
    assert all(torch.equal(p, parts.meta[name]) for name, p in whole.meta.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--iterations 7",
            "--iterations 7: {run} has already done 8; give a larger number, or leave it out",
        ),
        (
            "--log-every 1",
            "--log-every 1: {run} has done all of its 8 iterations; give more --iter",
        ),
        ("--threads 2", "--threads 2: {run} has done all of its 8 iterations"),
    ],
)
def test_a_finished_run_has_nothing_left_to_do_otherwise(
    flags: str, message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(finished, flags) == 2
    assert message.format(run=finished) in capsys.readouterr().err
    assert resumed(finished, "") == 0


# ---------------------------------------------------------------------------------------------
# another machine, other intervals


def test_other_threads_are_told_to_end_equality_of_bits(finished: Path) -> None:
    threads = torch.get_num_threads()
    told = (
        f"{finished}: changed from threads 1 to 2 after iteration 8; from here on its numbers are "
        "those of the unchanged run up to rounding, no longer bit for bit"
    )
    try:
        with pytest.warns(UserWarning, match=told) as seen:
            assert resumed(finished, "--iterations 16 --threads 2") == 0
        assert len(seen) == 1
    finally:
        torch.set_num_threads(threads)
    assert settings(finished)["threads"] == 2
    assert load_checkpoint(finished / "checkpoint.pt")["config"]["threads"] == 2


def test_intervals_may_change_and_the_weights_do_not(finished: Path) -> None:
    flags = "--iterations 16 --log-every 1 --validate-every 2 --checkpoint-every 3"
    assert resumed(finished, flags) == 0
    found = lines(finished)
    assert [r["iteration"] for r in found] == [1, 2, 4, 6, *range(8, 17)]
    assert [r["iteration"] for r in found if "validation" in r] == [4, 8, 10, 12, 14, 16]
    words = TINY.replace("--iterations 8", "--iterations 16")
    assert main(["train", *words.split(), "--out", str(finished.parent / "whole")]) == 0
    one, other = (load_run(p, "latest") for p in (finished, finished.parent / "whole"))
    assert all(torch.equal(p, other.meta[name]) for name, p in one.meta.items())


def test_the_runs_of_a_comparison_have_its_settings_and_no_others(tmp_path: Path) -> None:
    config = TrainConfig.of("sinusoid", iterations=4, meta_batch=2, hidden=4, validation_episodes=2)
    compare(config, ["uniform"], 1, 2, tmp_path, progress=False)
    longer = dataclasses.replace(config, iterations=8)
    with pytest.raises(InputError, match=r"other settings \(iterations 4, not 8\)"):
        compare(longer, ["uniform"], 1, 2, tmp_path, progress=False)
    train(longer, tmp_path / "uniform" / "seed0", progress=False)
    assert compare(longer, ["uniform"], 1, 2, tmp_path, progress=False).config == longer
