"""What is said of a mistyped name, wherever one can be given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gametalearn
from gametalearn import InputError, TrainConfig, environment
from gametalearn.cli import main


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
    assert "that is a flag of episodes, train, compare" in said(
        capsys, "evaluate", "a", "--shots", "5"
    )


def test_a_mistyped_key_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text("metabatch = 5\n")
    err = said(capsys, "train", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "a"))
    assert "'metabatch' is no option of train; did you mean 'meta-batch'? options: " in err


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
