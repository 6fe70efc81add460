"""What is said of a mistyped name, wherever one can be given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gametalearn
from gametalearn import InputError, Score, TrainConfig, environment
from gametalearn.cli import main
from gametalearn.units import Units


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that ends with exit code 2."""
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("trian --out a", "'train'"),
        ("train --meta-bach 4 --out a", "'--meta-batch'"),
        ("train --iteration=9 --out a", "'--iterations'"),
        ("compare --seed 3 --out a", "'--seeds'"),
        ("train --norm grop --out a", "'group'"),
        ("train --dataset omniglto --out a", "'omniglot'"),
        ("train --dataset mini_imagenet --out a", "'mini-imagenet'"),
        ("data prepare omniglto", "'omniglot'"),
    ],
)
def test_a_mistyped_word_of_the_command_line(
    capsys: pytest.CaptureFixture[str], command: str, meant: str
) -> None:
    assert f"did you mean {meant}?" in said(capsys, *command.split())


def test_what_is_like_nothing_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    err = said(capsys, "train", "--xyzzy", "--out", "a")
    assert "unrecognized arguments: --xyzzy (see gametalearn train --help)" in err


def test_a_flag_of_another_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "that is a flag of train, compare" in said(capsys, "evaluate", "a", "--meta-lr", "5")


def test_a_mistyped_key_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text("metabatch = 5\n")
    err = said(capsys, "train", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "a"))
    assert "'metabatch' is not an option of train; did you mean 'meta-batch'? options: " in err


def test_a_mistyped_setting_in_python() -> None:
    with pytest.raises(InputError, match="unknown settings meta_bach; did you mean 'meta_batch'"):
        TrainConfig.of("glyphs", meta_bach=4)


def test_the_version_is_told_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gametalearn {gametalearn.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", gametalearn.__version__)
    assert environment.version().split(" ")[0] == gametalearn.__version__
    light = "import sys, gametalearn; gametalearn.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", light], check=True)


def called(command: str) -> None:
    assert main(command.split()) == 0


def test_one_of_a_thing_is_not_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--dataset sinusoid --meta-batch 2 --hidden 4 --validation-episodes 2 --quiet"
    called(f"train {flags} --iterations 1 --out {tmp_path}/a")
    called(f"evaluate {tmp_path}/a --episodes 1 --quiet")
    flags += " --iterations 1 --seeds 1 --episodes 2 --rules uniform,agreement"
    called(f"compare {flags} --out {tmp_path}/b")
    said = capsys.readouterr().out + (tmp_path / "b" / "report.html").read_text()
    assert "1 iteration " in said
    assert not re.findall(r"\b1 (?:iterations|seeds|episodes|test episodes|runs|classes)\b", said)


def test_values_are_told_alike_in_progress_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--dataset glyphs --model mlp --hidden 4 --meta-batch 2 --image-size 4"
    flags += " --validation-episodes 2 --iterations 3 --validate-every 3"
    called(f"train {flags} --out {tmp_path}/a")
    said = capsys.readouterr()
    last = [line for line in said.err.splitlines() if ": 3/3, " in line][-1]
    shown = re.findall(r"accuracy (\d+\.\d\d%), validation (\d+\.\d\d%), ", last)
    assert len(shown) == 1
    assert f"best validation accuracy {shown[0][1]} at iteration 3" in said.out
    assert re.search(r", \d+\.\d (it/s|s/it)$", last)


def test_a_zero_has_no_sign() -> None:
    for format_ in ("percent", "number"):
        tiny = -1e-12 if format_ == "percent" else -0.0
        assert not Score("x", len, format=format_).show(tiny).startswith("-")  # type: ignore[arg-type]
        units = Units("x", format_ == "percent", 2)
        assert units.show(-1e-6, "+") == "+0.00"
