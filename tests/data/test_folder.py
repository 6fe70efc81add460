import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gametalearn.build import build_source
from gametalearn.cli import main
from gametalearn.config import TrainConfig
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
        save(tmp_path / "in" / split / name / "deeper" / "1.png", ord(name))
    (tmp_path / "in" / "train" / "notes.txt").write_text("no image")
    load = {s: load_folder(tmp_path / "in", s, tmp_path / "root") for s in ("train", "val", "test")}
    assert {s: d.classes for s, d in load.items()} == {
        "train": ("a", "b"),
        "val": ("c",),
        "test": ("d",),
    }


def test_a_class_called_test_is_a_class(tmp_path: Path) -> None:
    for i, name in enumerate(("test", "exam", "quiz")):
        save(tmp_path / "in" / name / "1.png", i)
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


def test_files_that_change_places_are_packed_again(tmp_path: Path) -> None:
    """Sizes and times of the contents are equal, as those of an unpacked archive are."""
    source, root = tmp_path / "in", tmp_path / "root"
    for name in ("a", "b", "c"):
        (source / name).mkdir(parents=True)
        value = 80 * (ord(name) - ord("a"))
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(source / name / "0.bmp")
        os.utime(source / name / "0.bmp", ns=(1, 1))

    def values() -> dict[str, int]:
        parts = [load_folder(source, split, root) for split in ("train", "val", "test")]
        return {part.classes[0]: int(part.images[int(part.first[0])].max()) for part in parts}

    assert values() == {"a": 0, "b": 80, "c": 160}
    (source / "a" / "0.bmp").rename(tmp_path / "0.bmp")
    (source / "b" / "0.bmp").rename(source / "a" / "0.bmp")
    (tmp_path / "0.bmp").rename(source / "b" / "0.bmp")
    assert values() == {"a": 80, "b": 0, "c": 160}


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
            save(tmp_path / "in" / split / name / "1.png", ord(name))
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
        "1 image beside the class folders (loose.png), class03/ (3 files, none named like an image), 1 .avif file"
    )


def test_folders_beside_the_splits_are_told(tmp_path: Path) -> None:
    for folder in ("train/a", "val/b", "test/c", "extra/d"):
        save(tmp_path / "in" / folder / "1.png", ord(folder[-1]))
    (tmp_path / "in" / "docs").mkdir()
    (tmp_path / "in" / "docs" / "readme.txt").write_text("no image, and no class")
    (tmp_path / "in" / "test" / "empty").mkdir()
    (tmp_path / "in" / "test" / "empty" / "a.dat").write_text("no image")
    assert left_out(tmp_path / "in", tmp_path / "root") == (
        "1 image in extra/ (extra/d/1.png), test/empty/ (1 file, none named like an image)"
    )


def test_too_few_test_images_are_found_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shades = iter(range(256))
    for split, count in (("train", 3), ("val", 3), ("test", 2)):
        for name in ("a", "b"):
            for i in range(count):
                save(tmp_path / "in" / split / f"{split}-{name}" / f"{i}.png", next(shades))
    flags = "--model mlp --hidden 4 --image-size 4 --ways 2 --shots 1 --meta-batch 2 --iterations 2"
    flags += f" --validation-episodes 2 --quiet --dataset folder:{tmp_path}/in"
    out = tmp_path / "run"
    assert main(["train", *flags.split(), "--queries", "2", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert (
        "1 shot + 2 queries = 3 examples per class requested, but class 'test-a' in split 'test'"
        in err
    )
    assert "has 2; lower --shots or --queries, or leave this class out" in err
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


# ---------------------------------------------------------------------------------------------
# layouts that are meant otherwise


def test_groups_of_classes_are_told(tmp_path: Path) -> None:
    shades = iter(range(256))
    for group in ("Greek", "Latin", "Tagalog", "Braille"):
        for c in range(3 if group != "Braille" else 1):
            save(tmp_path / "in" / group / f"character{c}" / "1.png", next(shades))
    text = (
        r"in: 3 of 4 class folders hold no images, only subfolders of images \(Greek/ has 3, such as "
        r"Greek/character0/\), .* move each of them up one level, or list the files in splits.csv "
        r"\(file,class,split\); a splits.csv of class,split keeps these classes"
    )
    with pytest.warns(UserWarning, match=text):
        load_folder(tmp_path / "in", "train", tmp_path / "root")
    (tmp_path / "in" / "splits.csv").write_text(
        "class,split\nGreek,train\nLatin,val\nTagalog,test\nBraille,test\n"
    )
    load_folder(tmp_path / "in", "train", tmp_path / "root")


def test_two_groups_of_classes_are_too_few_but_told(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "in" / "ab"[i % 2] / f"class{i}" / "1.png", i)
    with (
        pytest.warns(UserWarning, match="2 of 2 class folders hold no images"),
        pytest.raises(InputError, match="at least 3 are needed"),
    ):
        load_folder(tmp_path / "in", "train", tmp_path / "root")


def test_groups_within_splits_are_told(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "val", "test") * 2):
        save(tmp_path / "in" / split / f"of-{split}" / f"class{i}" / "1.png", i)
    with pytest.warns(UserWarning, match=r"\(train/of-train/ has 2, such as .*/class0/\)") as told:
        load_folder(tmp_path / "in", "train", tmp_path / "root")
    assert str(told[0].message).endswith("(file,class,split)")


def test_subfolders_of_a_class_are_no_groups_where_most_classes_have_none(tmp_path: Path) -> None:
    source = flat(tmp_path / "in", classes=3)
    for i in range(2):
        save(source / "deep" / f"session{i}" / "1.png", 100 + i)
        save(source / "class00" / f"session{i}" / "1.png", 110 + i)
    load_folder(source, "train", tmp_path / "root")


@pytest.mark.parametrize("strays", [("train",), ("train", "val", "test")])
def test_images_beside_the_classes_of_a_split(tmp_path: Path, strays: tuple[str, ...]) -> None:
    for i, split in enumerate(("train", "val", "test") * 2):
        save(tmp_path / "in" / split / f"class{i}" / "1.png", i)
    for i, split in enumerate(strays):
        save(tmp_path / "in" / split / "contact sheet.png", 50 + i)
    told = left_out(tmp_path / "in", tmp_path / "root")
    assert "1 image in train/ beside the class folders (train/contact sheet.png)" in told
    assert told.count("contact sheet") == len(strays)


def test_a_split_by_another_name_is_told(tmp_path: Path) -> None:
    for folder in ("train/a", "dev/b", "test/c"):
        save(tmp_path / "in" / folder / "1.png", ord(folder[-1]))
    with pytest.raises(InputError, match="none in val/; rename dev/ to val/, or give all of"):
        load_folder(tmp_path / "in", "train", tmp_path / "root")


@pytest.mark.parametrize("name", ["Splits.csv", "split.csv", "splits.tsv"])
def test_a_file_almost_called_splits_csv_is_told(tmp_path: Path, name: str) -> None:
    source = flat(tmp_path / "in", classes=3)
    (source / name).write_text("class,split\n")
    (source / "notes.csv").write_text("")
    with pytest.warns(UserWarning, match=f"{name} is not read; .* rename it to splits.csv") as told:
        load_folder(source, "train", tmp_path / "root")
    assert len(told) == 1


# ---------------------------------------------------------------------------------------------
# images that are there twice, cannot be read, or are black


def three_splits(root: Path) -> Path:
    for i, folder in enumerate(("train/a", "train/b", "val/c", "test/d")):
        for k in range(2):
            save(root / folder / f"{k}.png", 10 * i + k)
    return root


def test_a_class_linked_into_another_split_is_refused(tmp_path: Path) -> None:
    source = three_splits(tmp_path / "in")
    (source / "test" / "again").symlink_to(source / "train" / "a")
    with pytest.raises(
        InputError,
        match=r"train/a/0.png \(in train\) and test/again/0.png \(in test\) are one file",
    ) as error:
        load_folder(source, "train", tmp_path / "root")
    assert "\n" not in str(error.value)


def test_a_file_linked_into_another_class(tmp_path: Path) -> None:
    source = three_splits(tmp_path / "in")
    (source / "train" / "b" / "2.png").symlink_to(source / "train" / "a" / "0.png")
    text = r"1 image is in two classes, byte for byte \(train/a/0.png, train/b/2.png\); .* remove"
    with pytest.warns(UserWarning, match=text):
        load_folder(source, "train", tmp_path / "root")
    (source / "test" / "d" / "2.png").symlink_to(source / "train" / "a" / "0.png")
    with pytest.raises(InputError, match=r"test/d/2.png \(in test\) are one file, by a link"):
        load_folder(source, "train", tmp_path / "root")


def test_copies_are_told_when_they_are_packed(tmp_path: Path) -> None:
    source = three_splits(tmp_path / "in")
    for k in range(2):
        shutil.copy(source / "train" / "a" / f"{k}.png", source / "test" / "d" / f"copy{k}.png")
        shutil.copy(source / "val" / "c" / "0.png", source / "val" / "c" / f"same{k}.png")
    text = (
        r"2 images are in two splits, byte for byte \(train/a/0.png in train, test/d/copy0.png in test, "
        r"first\); few-shot splits must not share images, so remove the copies"
    )
    twice = r"2 images are twice in one class, byte for byte \(val/c/0.png, val/c/same0.png, first\); a copy in"
    with pytest.warns(UserWarning, match=text), pytest.warns(UserWarning, match=twice):
        load_folder(source, "train", tmp_path / "root")
    load_folder(source, "test", tmp_path / "root")


def test_all_files_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    source, root = flat(tmp_path / "in", classes=5), tmp_path / "root"
    for c in range(4):
        (source / f"class{c:02}" / "0.png").write_text("no image")
    with pytest.raises(
        InputError, match=r"in: 4 of 15 images cannot be read: .* and 1 more"
    ) as error:
        load_folder(source, "train", root)
    text = str(error.value)
    assert sum(f"class{c:02}/0.png" in text for c in range(5)) == 3
    assert "(the first: not a readable image: none of" in text
    assert text.endswith("repair the files, or take them out of the folder")
    assert "\n" not in text


def test_what_failed_is_no_packed_copy(tmp_path: Path) -> None:
    source, root = flat(tmp_path / "in", classes=3), tmp_path / "root"
    (source / "class00" / "0.png").write_text("no image")
    with pytest.raises(InputError, match="repair the file"):
        load_folder(source, "train", root)
    assert describe(root)[-1][0] == "folder:PATH"
    assert clean(root) == []
    assert list((root / "folders").iterdir()) == []
    (root / "folders" / "killed").mkdir()
    (root / "folders" / "killed" / ".packing-x").write_bytes(bytes(10**6))
    assert describe(root)[-1] == ("  killed", "1.0 MB of a packing that was interrupted")
    assert clean(root) == [
        f"removed {root}/folders/killed (1.0 MB of a packing that was interrupted)"
    ]


def test_twelve_bits_in_sixteen_are_told(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / "in" / f"c{i // 3}").mkdir(parents=True, exist_ok=True)
        pixels = np.full((4, 4), 4095 - i if i else 65535, np.uint16)
        Image.fromarray(pixels).save(tmp_path / "in" / f"c{i // 3}" / f"{i}.png")
    text = r"8 of 9 images are almost black \(no value above 15 of 255\); scale .* 12 bits in 16, .* by 16"
    with pytest.warns(UserWarning, match=text):
        load_folder(tmp_path / "in", "train", tmp_path / "root")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_white_drawings_that_vanish_over_white_are_told(tmp_path: Path, mode: str) -> None:
    for i in range(9):
        alpha = np.random.default_rng(i).integers(1, 256, (4, 4), np.uint8)
        image = Image.fromarray(alpha) if i == 8 else Image.new("L", (4, 4), 255)
        if mode == "P":
            image = Image.fromarray(alpha).convert("P")
            image.info["transparency"] = bytes(256) if i < 8 else bytes([255]) * 256
        else:
            image.putalpha(Image.fromarray(alpha))
            image = image.convert(mode)
        file = tmp_path / "in" / f"c{i // 3}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    text = "8 of 9 images became white when transparency was laid over white; lay .*first: c0/0.png"
    with pytest.warns(UserWarning, match=text):
        load_folder(tmp_path / "in", "train", tmp_path / "root")


def test_a_class_that_is_trained_on_in_one_folder_and_tested_in_another_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photographs and drawings of the same things, each folder divided by itself."""
    monkeypatch.setenv("GAMETALEARN_DATA", str(tmp_path / "data"))
    for folder, swapped in (("photo", False), ("sketch", True), ("alike", False)):
        for split in ("train", "val", "test"):
            for i, name in enumerate(("a", "b")):
                place = {"train": "test", "test": "train"}.get(split, split) if swapped else split
                for k in range(2):
                    save(tmp_path / folder / place / f"{split}-{name}" / f"{k}.png", 10 * i + k)

    def started(*folders: str) -> None:
        names = "+".join(f"folder:{tmp_path / name}" for name in folders)
        build_source(TrainConfig.of(names, ways=2, queries=1), "train")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        started("photo", "alike")
    assert not [one for one in told if "training classes" in str(one.message)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        started("photo", "sketch")
    said = [str(one.message) for one in told if "training classes" in str(one.message)]
    assert len(said) == 2
    assert said[0].startswith("the class 'test-a' and 1 more of the test classes of folder:")
