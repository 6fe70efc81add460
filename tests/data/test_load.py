import os
import subprocess
import sys
from pathlib import Path

import pytest

from gametalearn.data import data_root, load_dataset
from gametalearn.errors import InputError

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT)}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown data set 'imagenet'; .*known: glyphs, omniglot, mini"
    ):
        load_dataset("imagenet", "train", root=tmp_path)


def test_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'valid' is unknown; use one of train, val, test"):
        load_dataset("omniglot", "valid", root=tmp_path)


def test_an_unknown_class_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="split 'vinyals' is unknown; use one of lake, maml"):
        load_dataset("omniglot", "train", root=tmp_path, class_split="vinyals")
    with pytest.raises(InputError, match="'mini-imagenet' has one way"):
        load_dataset("mini-imagenet", "train", root=tmp_path, class_split="lake")


@pytest.mark.parametrize("name", ["omniglot", "mini-imagenet"])
def test_a_missing_data_set_names_place_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("GAMETALEARN_DATA", str(tmp_path))
    assert data_root() == tmp_path
    with pytest.raises(InputError) as error:
        load_dataset(name, "train")
    assert str(tmp_path / name) in str(error.value)
    assert f"`gametalearn data prepare {name} " in str(error.value)
    assert "\n" not in str(error.value)


def test_importing_the_data_sets_is_light() -> None:
    code = (
        "import sys, gametalearn, gametalearn.data; "
        "print([m for m in ('PIL', 'matplotlib', 'torchvision') if m in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["omniglot", "mini_imagenet"])
def test_the_scripts_say_what_is_wrong(tmp_path: Path, name: str) -> None:
    script = PROJECT / "data_scripts" / f"prepare_{name}.py"
    done = python(str(script), "--source", str(tmp_path), "--root", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path) in done.stderr
