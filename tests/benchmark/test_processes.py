"""A side's process ends with its work, with an error in one line, or with the one that started it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import gametalearn
from gametalearn import InputError
from gametalearn.benchmark import Setting
from gametalearn.benchmark.__main__ import main
from gametalearn.benchmark.processes import Job, in_process

SMALL = Setting(tasks=2, ways=3, steps=2, image_size=16, hidden=4)
ROOT = str(Path(gametalearn.__file__).parents[1])


def test_a_broken_learn2learn_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "learn2learn.py").write_text("raise ImportError('half of it is missing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = Job("learn2learn", "omniglot-5w1s", SMALL, threads=1, repeats=1)
    with pytest.raises(InputError) as caught:
        in_process(job)
    assert str(caught.value) == (
        "bench: learn2learn cannot be imported (half of it is missing); install it with "
        "`make learn2learn`"
    )


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("raise KeyError('no such thing')", "KeyError: 'no such thing'"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL (the system may be short of mem"),
        ("import os; os._exit(7)", "exit code 7 without a message"),
    ],
)
def test_a_side_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    (tmp_path / "learn2learn.py").write_text(does + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = Job("learn2learn-as-shipped", "omniglot-5w1s", SMALL, threads=1, repeats=1)
    expected = f"bench: learn2learn-as-shipped failed in its process: {said}"
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        in_process(job)
    assert "\n" not in str(caught.value)


def test_one_side_by_hand_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    setting = json.dumps({"tasks": 2, "ways": 3, "image_size": 16, "hidden": 4})
    assert main(["--side", "floor", "--threads", "1", "--repeats", "3", "--setting", setting]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (out.count("\n"), err) == (1, "")
    assert (record["side"], record["pid"], len(record["ms"])) == ("floor", os.getpid(), 3)
    assert record["median_ms"] == sorted(record["ms"])[1] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--side", "torch"], "invalid choice: 'torch'"),
        (["--side", "floor", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--side", "reference"], "--side reference needs --rows"),
        (["--side", "floor", "--rows", "x"], "--rows is for gametalearn, learn2learn and refer"),
    ],
)
def test_bad_arguments_are_named(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@contextmanager
def a_long_bench() -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """``gametalearn bench`` in the middle of a side, and that side's process."""
    words = ["bench", "--threads", "1", "--repeats", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gametalearn", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
        # where the tests run in the background, SIGINT is ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not children:
            assert process.poll() is None
            assert time.monotonic() < deadline
            children = psutil.Process(process.pid).children()
            time.sleep(0.05)
        yield process, children[0]
    finally:
        for one in (process, *children):
            if one.is_running() if isinstance(one, psutil.Process) else one.poll() is None:
                one.kill()
        process.communicate()


def test_ctrl_c_ends_the_side_too() -> None:
    with a_long_bench() as (process, side):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert out == ""
        started, ended = err.splitlines()
        assert started.startswith("gametalearn: bench: gametalearn, round 1 of 3 (process 1 of 19)")
        assert ended == "gametalearn: interrupted; no result was written"
        assert not side.is_running()


def test_a_side_does_not_outlive_the_one_that_started_it() -> None:
    with a_long_bench() as (process, side):
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs([side], timeout=60)
        assert not alive
