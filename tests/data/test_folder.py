import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gametalearn.cli import main
from gametalearn.data import folder as module
from gametalearn.data import load_dataset
from gametalearn.data.catalog import clean, describe
from gametalearn.data.decode import decode
from gametalearn.data.folder import deal_classes, load_folder
from gametalearn.errors import InputError
from gametalearn.images import ClassImages


def save(path: Path, value: int, size: tuple[int, int] = (10, 6), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value, 0, 255 - value) if mode == "RGB" else value).save(path)


def flat(root: Path, classes: int = 20) -> Path:
    """Image i of class c is of the colour c * 10 + i."""
    for c in range(classes):
        for i in range(3):
            save(root / f"class{c:02}" / f"{i}.{('png', 'jpg', 'bmp')[i]}", c * 10 + i)
    return root


def colours(data: ClassImages, name: str) -> list[int]:
    c = data.classes.index(name)
    first, count = int(data.first[c]), int(data.count[c])
    return [int(x[0].float().mean().round()) for x in data.images[first : first + count]]


def test_every_class_is_in_one_split(tmp_path: Path) -> None:
    source = flat(tmp_path / "pictures")
    parts = {
        s: load_dataset(f"folder:{source}", s, root=tmp_path) for s in ("train", "val", "test")
    }
    names = [name for part in parts.values() for name in part.classes]
    assert sorted(names) == [f"class{c:02}" for c in range(20)]
    assert [p.num_classes for p in parts.values()] == [10, 5, 5]
    for part in parts.values():
        assert part.name == "pictures"
        assert part.shape == (3, 84, 84)
        for name in part.classes:
            expected = [int(name[-2:]) * 10 + i for i in range(3)]
            assert np.abs(np.subtract(colours(part, name), expected)).max() <= 2  # JPEG


def test_given_splits_are_kept(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("val", "c"), ("test", "d")):
        save(tmp_path / "in" / split / name / "deeper" / "1.png", 7)
    (tmp_path / "in" / "train" / "notes.txt").write_text("no image")
    load = {s: load_folder(tmp_path / "in", s, tmp_path / "root") for s in ("train", "val", "test")}
    assert {s: d.classes for s, d in load.items()} == {
        "train": ("a", "b"),
        "val": ("c",),
        "test": ("d",),
    }


def test_a_class_called_test_is_a_class(tmp_path: Path) -> None:
    for name in ("test", "exam", "quiz"):
        save(tmp_path / "in" / name / "1.png", 7)
    parts = [load_folder(tmp_path / "in", s, tmp_path / "root") for s in ("train", "val", "test")]
    assert sorted(p.classes[0] for p in parts) == ["exam", "quiz", "test"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/1.png", "val/b/1.png"], "none in test/"),
        (["train/a/1.png", "val/b/1.png", "test/a/1.png"], "class 'a' is in train and in test"),
        (["a/1.png", "b/1.png"], "2 class folders with images, but at least 3"),
        (["1.png", "2.png"], "0 class folders"),
        (["a/1.txt", "b/.hidden.png", "c/1.png"], "1 class folder with images"),
    ],
)
def test_what_is_wrong_with_a_tree(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        if file.endswith("png"):
            save(tmp_path / "in" / file, 1)
        else:
            (tmp_path / "in" / file).parent.mkdir(parents=True)
            (tmp_path / "in" / file).write_text("text")
    with pytest.raises(InputError, match=message) as error:
        load_folder(tmp_path / "in", "train", tmp_path / "root")
    assert "\n" not in str(error.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent is not a folder"):
        load_dataset(f"folder:{tmp_path / 'absent'}", "train", root=tmp_path)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    source = flat(tmp_path / "in", classes=3)
    (source / "class01" / "9.png").write_text("no image")
    with pytest.raises(
        InputError, match=r"class01/9.png: not a readable image: .*; repair the file"
    ):
        load_folder(source, "train", tmp_path / "root")
    (source / "class01" / "9.png").unlink()
    load_folder(source, "train", tmp_path / "root")


def test_the_cache_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = flat(tmp_path / "in", classes=3)
    decoded: list[str] = []

    def counting(data: bytes, what: str) -> Image.Image:
        decoded.append(what)
        return decode(data, what)

    monkeypatch.setattr(module, "decode", counting)

    def built() -> int:
        decoded.clear()
        for split in ("train", "val", "test"):
            load_folder(source, split, tmp_path / "root")
        return len(decoded)

    assert built() == 9
    assert built() == 0
    save(source / "class00" / "new.png", 1)
    assert built() == 10
    (source / "class00" / "new.png").unlink()
    assert built() == 9
    os.utime(source / "class02" / "1.jpg", ns=(1, 1))
    assert built() == 9
    next((tmp_path / "root").rglob("images-*.npy")).write_bytes(b"damaged")
    assert built() == 9
    assert built() == 0
    assert len(list((tmp_path / "root").rglob("images-*.npy"))) == 1


def test_size_and_channels_are_packed_apart(tmp_path: Path) -> None:
    source = flat(tmp_path / "in", classes=3)
    load = load_dataset(str(source), "train", root=tmp_path / "root", image_size=20, channels=1)
    assert load.shape == (1, 20, 20)
    assert load_dataset(str(source), "train", root=tmp_path / "root").shape == (3, 84, 84)
    with pytest.raises(InputError, match="channels 1 or 3"):
        load_dataset(str(source), "train", root=tmp_path / "root", channels=2)


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    source = flat(tmp_path / "in", classes=2)
    save(tmp_path / "elsewhere" / "1.png", 77)
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "class00" / "circle").symlink_to(source)
    parts = [load_folder(source, s, tmp_path / "root") for s in ("train", "val", "test")]
    assert sorted(p.classes[0] for p in parts) == ["class00", "class01", "linked"]


def test_dealing_is_stable_and_proportioned() -> None:
    names = [f"n{i}" for i in range(100)]
    dealt = deal_classes(names, "here")
    assert {s: len(c) for s, c in dealt.items()} == {"train": 64, "val": 16, "test": 20}
    assert deal_classes(reversed(names), "here") == dealt
    more = deal_classes([*names, "n100"], "here")
    moved = sum(n not in more[s] for s, classes in dealt.items() for n in classes)
    assert moved <= 3
    for count in range(3, 40):
        sizes = [len(c) for c in deal_classes(names[:count], "here").values()]
        assert sum(sizes) == count
        assert min(sizes) >= min(5, count // 3)


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("train", "valid", "test"),
        ("training", "validation", "testing"),
        ("TRAIN", "Validation", "Test"),
    ],
)
def test_splits_by_other_names(tmp_path: Path, splits: tuple[str, str, str]) -> None:
    for split, names in zip(splits, (("a", "b"), ("c",), ("d", "e")), strict=True):
        for name in names:
            save(tmp_path / "in" / split / name / "1.png", 7)
    load = {s: load_folder(tmp_path / "in", s, tmp_path / "root") for s in ("train", "val", "test")}
    assert [data.classes for data in load.values()] == [("a", "b"), ("c",), ("d", "e")]


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    for folder in ("train", "val", "valid", "test"):
        save(tmp_path / "in" / folder / f"of-{folder}" / "1.png", 7)
    with pytest.raises(InputError, match="val/ and valid/ are both names for the val classes"):
        load_folder(tmp_path / "in", "train", tmp_path / "root")


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jif", "pjpeg", "apng", "dib", "pnm"])
def test_other_ends_of_the_same_formats(tmp_path: Path, suffix: str) -> None:
    source = flat(tmp_path / "in", classes=3)
    for file in sorted((source / "class01").iterdir()):
        file.rename(file.with_suffix(f".{suffix}"))
    parts = [load_folder(source, s, tmp_path / "root") for s in ("train", "val", "test")]
    assert sorted(p.classes[0] for p in parts) == ["class00", "class01", "class02"]
    assert [p.count.tolist() for p in parts] == [[3]] * 3


def left_out(folder: Path, root: Path) -> str:
    with pytest.warns(UserWarning, match="left out") as told:
        load_folder(folder, "train", root)
    assert len(told) == 1
    return str(told[0].message).partition("left out ")[2]


def test_nothing_vanishes_without_a_word(tmp_path: Path) -> None:
    source = flat(tmp_path / "in", classes=4)
    for file in sorted((source / "class03").iterdir()):
        file.rename(file.with_suffix(".heic"))
    (source / "class00" / "x.avif").write_bytes(b"")
    (source / "class00" / "notes.txt").write_text("beside the images")
    (source / "class00" / ".DS_Store").write_bytes(b"")
    save(source / "loose.png", 1)
    assert left_out(source, tmp_path / "root") == (
        "1 image in no folder, class03/ (3 files, none named like an image), 1 .avif file"
    )


def test_folders_beside_the_splits_are_told(tmp_path: Path) -> None:
    for folder in ("train/a", "val/b", "test/c", "extra/d"):
        save(tmp_path / "in" / folder / "1.png", 7)
    (tmp_path / "in" / "docs").mkdir()
    (tmp_path / "in" / "docs" / "readme.txt").write_text("no image, and no class")
    (tmp_path / "in" / "test" / "empty").mkdir()
    (tmp_path / "in" / "test" / "empty" / "a.dat").write_text("no image")
    assert left_out(tmp_path / "in", tmp_path / "root") == (
        "1 image in extra, test/empty/ (1 file, none named like an image)"
    )


def test_too_few_test_images_are_found_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 3), ("val", 3), ("test", 2)):
        for name in ("a", "b"):
            for i in range(count):
                save(tmp_path / "in" / split / f"{split}-{name}" / f"{i}.png", i)
    flags = "--model mlp --hidden 4 --image-size 4 --ways 2 --shots 1 --meta-batch 2 --iterations 2"
    flags += f" --validation-episodes 2 --quiet --dataset folder:{tmp_path}/in"
    out = tmp_path / "run"
    assert main(["train", *flags.split(), "--queries", "2", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert (
        "1 shot + 2 queries = 3 examples per class requested, but class 'test-a' in split 'test'"
        in err
    )
    assert "has 2; lower --shots or --queries" in err
    assert not out.exists()
    assert main(["train", *flags.split(), "--queries", "1", "--out", str(out)]) == 0
    assert main(["evaluate", str(out), "--episodes", "2", "--quiet"]) == 0
    # a run that has begun goes on, whatever became of its test classes' size
    for place in (tmp_path / "in" / "test").iterdir():
        (place / "0.png").unlink()
    (out / "data.json").unlink()
    with pytest.warns(UserWarning, match="could not be verified"):
        assert main(["train", "--resume", str(out), "--quiet"]) == 0


def test_packed_copies_are_listed_and_removed(tmp_path: Path) -> None:
    first, second = flat(tmp_path / "first"), flat(tmp_path / "second", 4)
    root = tmp_path / "root"
    for folder in (first, second):
        load_dataset(f"folder:{folder}", "train", root=root)
    copies = {text.split(" of ")[1]: name.strip() for name, text in describe(root)[-2:]}
    assert copies.keys() == {str(first), str(second)}
    assert copies[str(first)].startswith("first-")
    (said,) = clean(root, copies[str(first)])
    assert str(first) in said
    assert [p.name for p in (root / "folders").iterdir()] == [copies[str(second)]]
    assert load_dataset(f"folder:{first}", "train", root=root).num_classes == 10  # made anew
    assert len(clean(root)) == 2
    assert clean(root) == []
    assert (first / "class00").is_dir()
    with pytest.raises(InputError, match="no packed copy 'first'"):
        clean(root, "first")
