import os
import subprocess
import sys
from pathlib import Path

import pytest

from gametalearn.data import data_root, load_dataset, load_part
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
    with pytest.raises(InputError, match="'mini-imagenet' has only one class split"):
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


SMALL = """
import torchvision


def same_for_every_split(root):
    return torchvision.datasets.FakeData(60, (1, 16, 16), 12)
"""


def test_what_gives_the_same_for_every_split_gets_its_classes_dealt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small_data.py").write_text(SMALL)
    monkeypatch.syspath_prepend(tmp_path)
    parts = [
        load_dataset("small_data:same_for_every_split", split, root=tmp_path)
        for split in ("train", "val", "test")
    ]
    classes = [name for part in parts for name in part.classes]
    assert len(classes) == len(set(classes)) == 12
    assert [part.num_classes for part in parts] == [4, 4, 4]
    assert sum(int(part.count.sum()) for part in parts) == 60


OBJECTS = """
import torch
from gametalearn import ClassExamples, EpisodeSampler

pair = torch.arange(24.0).view(24, 1), torch.arange(24) // 2
data = ClassExamples.from_tensors(*pair)
pairs = torch.utils.data.TensorDataset(*pair)
sampler = EpisodeSampler(data, ways=2, shots=1, queries=1)
number = 3.14
"""


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "named_objects.py").write_text(OBJECTS)
    monkeypatch.syspath_prepend(tmp_path)
    return "named_objects"


@pytest.mark.parametrize("name", ["data", "pair", "pairs"])
def test_a_data_set_may_be_named_itself(objects: str, name: str) -> None:
    parts = [load_part(f"{objects}:{name}", split) for split in ("train", "val", "test")]
    assert sorted(c for part in parts for c in part.classes) == sorted(map(str, range(12)))
    assert [part.num_classes for part in parts] == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sampler",
            r"draws its own episodes \(EpisodeSampler\), the same for training and test; name a",
        ),
        ("number", "dataset named_objects:number is neither a ClassImages, ClassExamples"),
    ],
)
def test_objects_that_are_no_data_sets(objects: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_part(f"{objects}:{name}", "train")


def test_torchvisions_own_splits_do_not_leak_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `split` and `train` divide each class's examples; classes are dealt all the same."""
    datasets = pytest.importorskip("torchvision").datasets
    made = []

    class Numbers(datasets.FakeData):  # type: ignore[misc, name-defined]
        def __init__(self, root: Path, split: str = "theirs", download: bool = False) -> None:
            super().__init__(90, (3, 8, 8), 9)
            made.append((root, split, download))

    Numbers.__module__ = "torchvision.datasets.numbers"
    monkeypatch.setattr(datasets, "Numbers", Numbers, raising=False)
    parts = [
        load_dataset("torchvision.datasets:Numbers", split, root=tmp_path, image_size=16)
        for split in ("train", "val", "test")
    ]
    assert made == [(tmp_path / "torchvision", "theirs", True)] * 3
    assert sorted(name for part in parts for name in part.classes) == [str(c) for c in range(9)]
    assert {part.shape for part in parts} == {(3, 16, 16)}
