"""``splits.csv`` in a folder of images: what it does, and what is wrong with it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gametalearn import InputError, TrainConfig, load_dataset, train
from gametalearn.cli import main
from gametalearn.data.folder import load_folder
from gametalearn.data.identity import FolderIdentity, differences

SPLITS = ("train", "val", "test")


def picture(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(file)


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Folders a to h of 3 images each; image i of class c is of the shade 10 c + i."""
    root = tmp_path / "birds"
    for c, name in enumerate("abcdefgh"):
        for i in range(3):
            picture(root / name / f"{i}.png", 10 * c + i)
    return root


def write(folder: Path, *lines: str) -> None:
    (folder / "splits.csv").write_text("\n".join(lines) + "\n")


def shades(folder: Path) -> dict[str, dict[str, list[int]]]:
    """By split and class, of the packed images."""
    found: dict[str, dict[str, list[int]]] = {}
    for split in SPLITS:
        data = load_folder(folder, split, folder.parent / "root", image_size=4, channels=1)
        found[split] = {
            name: data.images[first : first + count, 0, 0, 0].tolist()
            for name, first, count in zip(
                data.classes, data.first.tolist(), data.count.tolist(), strict=True
            )
        }
    return found


BY_CLASS = ["class,split", *(f"{c},train" for c in "hba"), "c,val", "d,test", "e,val", "f,test", "g,train"]  # fmt: skip


def test_classes_by_their_splits(birds: Path) -> None:
    write(birds, *BY_CLASS)
    found = shades(birds)
    assert {split: "".join(classes) for split, classes in found.items()} == {
        "train": "abgh",
        "val": "ce",
        "test": "df",
    }
    assert found["test"]["f"] == [50, 51, 52]


def test_files_by_their_classes_and_splits(birds: Path) -> None:
    picture(birds / "loose" / "deep" / "x.png", 200)
    write(
        birds, "file,class,split", "./a/2.png,round,train", "a/0.png,round,Training", "b//1.png,flat,valid",
        "loose/deep/x.png,flat,val", "", "h/0.png,odd,TEST", "h/1.png,odd,test",
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"left out 19 images that splits.csv does not list \(a/1"):
        found = shades(birds)
    assert found == {
        "train": {"round": [0, 2]},
        "val": {"flat": [11, 200]},
        "test": {"odd": [70, 71]},
    }


def test_columns_quotes_and_marks_as_spreadsheets_write_them(birds: Path) -> None:
    (birds / "c").rename(birds / "c, or d")
    lines = ["Split; Class".replace(";", ",")]
    lines += [f"{s},{c}" for s, c in zip(["train", "train", "val", "test"], "abgh", strict=True)]
    lines += ['test , "c, or d"'.replace(' "', '"'), ","]
    (birds / "splits.csv").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    with pytest.warns(UserWarning, match="left out 9 images"):
        assert list(shades(birds)["test"]) == ["c, or d", "h"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,train", "b,val", "c,test"], r"line 1: the header must be class,split or file,class"),
        ([""], "line 1: the header must be .* got ''"),
        (["class,split,notes", "a,train,x"], "line 1: the header must be .* got 'class,split,notes'"),
        (["class,class", "a,train"], "line 1: the header must be"),
        (["class,split", "a,train", "x,val"], "line 3: there is no folder of images for class 'x'"),
        (["class,split", "a,train", "b,vla"], "line 3: split 'vla' is unknown; .* train, val, test"),
        (["class;split", "a;train"], "line 1: .* got 'class;split'; separate the values by commas, not by ';'"),
        (["class\tsplit", "a\ttrain"], r"line 1: .*; separate the values by commas, not by '\\t'"),
        (["class,split", "a,train", "b,dev"], "line 3: split 'dev' is unknown; did you mean 'val'"),
        (["class,split", "a,train", "b,tran"], "line 3: .* did you mean 'train'"),
        (["class,split", "a,train", "", "a,test"], "line 4: 'a' is already in line 2"),
        (["class,split", "a,train", "b,train,x"], r"line 3: expected 2 values \(class,split\), got 'b,tr"),
        (["class,split", "a,train", "b"], "line 3: expected 2 values"),
        (["class,split", "a,train", ",val"], "line 3: expected 2 values"),
        (["class,split", "a,train", "b,val"], "no line has the split test; each split needs classes"),
        (["class,split", '"a"b,train'], "line 2: not CSV"),
        (["file,class,split", "a/9.png,x,train"], "line 2: there is no file 'a/9.png'; give paths"),
        (["file,class,split", "../a/0.png,x,train"], "line 2: there is no file"),
        (["file,class,split", "a,x,train"], "line 2: there is no file 'a'"),
        (["file,class,split", "a/1.png,x,train", "./a/1.png,y,val"], "line 3: 'a/1.png' is already in"),
        (["file,class,split", "a/1.png,x,train", "a/2.png,x,val"],
         "line 3: class 'x' is in val, but in train according to line 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_line(birds: Path, lines: list[str], message: str) -> None:
    write(birds, *lines)
    with pytest.raises(InputError, match=rf"birds/splits.csv(, |: ){message}") as error:
        load_folder(birds, "train", birds.parent / "root")
    assert "\n" not in str(error.value)


def test_other_encodings_and_what_is_no_image(birds: Path) -> None:
    (birds / "splits.csv").write_bytes("class,split\né,train".encode("latin-1"))
    with pytest.raises(InputError, match=r"splits.csv: not UTF-8 text .*save it as UTF-8"):
        load_folder(birds, "train", birds.parent / "root")
    (birds / "notes.txt").write_text("text")
    (birds / "scan").write_text("text")
    write(birds, "file,class,split", "scan,x,train", "a/0.png,y,val", "b/0.png,z,test")
    remedy = "repair the file, or take it out of the folder, and of splits.csv if it lists it"
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match=rf"scan: not a readable image: .*; {remedy}"),
    ):
        load_folder(birds, "train", birds.parent / "root")
    write(birds, "file,class,split", "a/0.png,y,val", "notes.txt,x,train", "b/0.png,z,test")
    with pytest.raises(InputError, match=r"line 3: .txt files are not read .*; remove the line"):
        load_folder(birds, "train", birds.parent / "root")


def test_unread_formats_are_told(birds: Path) -> None:
    write(birds, *BY_CLASS)
    for name in ("x.heic", "y.HEIC", "notes.txt"):
        (birds / "a" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out 2 \.heic files$"):
        load_folder(birds, "train", birds.parent / "root")


def test_one_file_by_two_paths(birds: Path) -> None:
    (birds / "b" / "link.png").symlink_to(birds / "a" / "0.png")
    lines = ["a/0.png,x,train", "c/0.png,y,val", "b/link.png,z,test"]
    write(birds, "file,class,split", *lines)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match=r"a/0.png \(in train\) and b/link.png \(in test\) are one"),
    ):
        load_folder(birds, "train", birds.parent / "root")


def test_a_changed_file_changes_what_is_packed_and_what_the_folder_is(birds: Path) -> None:
    lines = [f"{c}/{i}.png,{c},{s}" for c, s in zip("abcd", ("train", *SPLITS), strict=True) for i in range(3)]  # fmt: skip
    for name in "efgh":
        for file in (birds / name).iterdir():
            file.unlink()
        (birds / name).rmdir()
    write(birds, "file,class,split", *lines)
    before, first = FolderIdentity.of(birds), shades(birds)
    write(birds, "file,class,split", *reversed(lines), "")
    assert differences(before, FolderIdentity.of(birds)) == []
    assert shades(birds) == first
    # two images change places: nothing but a class differs, in no other split
    swapped = [line.replace("a/0.png,a", "a/0.png,?") for line in lines]
    swapped = [line.replace("b/0.png,b", "b/0.png,a").replace("?", "b") for line in swapped]
    write(birds, "file,class,split", *swapped)
    assert shades(birds)["train"] == {"a": [1, 2, 10], "b": [0, 11, 12]}
    assert differences(before, FolderIdentity.of(birds)) == [
        "'a' has files of other names or sizes",
        "'b' has files of other names or sizes",
    ]


def test_a_run_goes_on_with_the_split_that_it_began_with(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(birds, *BY_CLASS)
    small = {"model": "mlp", "hidden": 4, "image_size": 4, "channels": 1, "ways": 2, "queries": 1}
    small |= {"meta_batch": 2, "iterations": 2, "validation_episodes": 2, "inner_steps": 1}
    config, run = TrainConfig.of(f"folder:{birds}", **small, threads=1), birds.parent / "run"
    train(config, run, progress=False)
    assert load_dataset(f"folder:{birds}", "test").classes == ("d", "f")
    (birds / "splits.csv").rename(birds.parent / "kept.csv")
    moved = [line.replace("c,val", "c,test").replace("d,test", "d,val") for line in BY_CLASS]
    for change in (lambda: write(birds, *moved), lambda: (birds / "splits.csv").unlink()):
        change()
        for words in (["train", "--resume", str(run)], ["evaluate", str(run), "--episodes", "2"]):
            assert main([*words, "--quiet"]) == 2
            assert "was in val and is in" in capsys.readouterr().err
    (birds.parent / "kept.csv").rename(birds / "splits.csv")
    assert main(["evaluate", str(run), "--episodes", "2", "--quiet"]) == 0
    # it travels with the folder
    birds.rename(birds.parent / "elsewhere")
    words = ["--dataset", f"folder:{birds.parent / 'elsewhere'}", "--episodes", "2", "--quiet"]
    assert main(["evaluate", str(run), *words]) == 0


def test_shades_are_those_of_the_files(birds: Path) -> None:
    """The helper itself: without a file, all images are there."""
    found = shades(birds)
    flat = sorted(v for classes in found.values() for values in classes.values() for v in values)
    assert flat == np.add.outer(10 * np.arange(8), np.arange(3)).flatten().tolist()
