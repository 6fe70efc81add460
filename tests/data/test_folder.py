import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
        (["a/1.png", "b/1.png"], "2 class folders with images, at least 3"),
        (["1.png", "2.png"], "0 class folders"),
        (["a/1.txt", "b/.hidden.png", "c/1.png"], "1 class folders"),
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
