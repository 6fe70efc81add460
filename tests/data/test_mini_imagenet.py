import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn import EpisodeSampler
from gametalearn.data import load_dataset, prepare_mini_imagenet
from gametalearn.errors import InputError

SPLITS = {"train": ("n04", "n01", "n03"), "val": ("n02",), "test": ("n05", "n06")}
EACH = 4


def picture(label: str, i: int) -> np.ndarray[Any, Any]:
    """84 x 84 x 3: smooth, of its own colours, with a direction in both axes."""
    ramp = np.linspace(0, 60, 84)
    red = int(label[1:]) * 30 + 0 * ramp[:, None] + 0 * ramp
    return np.stack(
        [red, i * 40 + ramp[:, None] + 0 * ramp, 90 + ramp + 0 * ramp[:, None]], 2
    ).astype(np.uint8)


def encoded(label: str, i: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(label, i)).save(out, kind)
    return out.getvalue()


def tables(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, labels in SPLITS.items():
        rows = [f"{label}{i:08}.jpg,{label}" for i in range(EACH) for label in labels]
        (folder / f"{split}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    return folder


def files() -> dict[str, bytes]:
    return {
        f"{label}{i:08}.jpg": encoded(label, i)
        for labels in SPLITS.values()
        for label in labels
        for i in range(EACH)
    }


def as_csv_and_folder(folder: Path) -> Path:
    (tables(folder) / "images").mkdir()
    for name, data in files().items():
        (folder / "images" / name).write_bytes(data)
    return folder


def as_csv_and_zip(folder: Path, prefix: str = "images/") -> Path:
    with zipfile.ZipFile(tables(folder) / "images.zip", "w") as archive:
        for name, data in files().items():
            archive.writestr(prefix + name, data)
    return folder


def as_class_folders(folder: Path) -> Path:
    for split, labels in SPLITS.items():
        for label in labels:
            (folder / split / label).mkdir(parents=True)
            for i in range(EACH):
                (folder / split / label / f"{i}.png").write_bytes(encoded(label, i))
    return folder


def as_pickles(
    folder: Path, change: Callable[[dict[str, Any]], Any] = lambda content: content
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, labels in SPLITS.items():
        images = np.stack([picture(label, i) for i in range(EACH) for label in labels])
        numbers = {
            label: list(range(k, len(images), len(labels))) for k, label in enumerate(labels)
        }
        content = change({"image_data": images, "class_dict": numbers})
        with (folder / f"mini-imagenet-cache-{split}.pkl").open("wb") as stream:
            pickle.dump(content, stream, protocol=2)
    return folder


def with_labels(content: dict[str, Any]) -> dict[str, Any]:
    labels = [""] * len(content["image_data"])
    for label, numbers in content["class_dict"].items():
        for number in numbers:
            labels[number] = label
    return {"data": content["image_data"], "labels": labels}


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "csv and folder": as_csv_and_folder,
    "csv and zip": as_csv_and_zip,
    "csv and flat zip": lambda folder: as_csv_and_zip(folder, prefix=""),
    "class folders": as_class_folders,
    "pickles": as_pickles,
    "pickles with labels": lambda folder: as_pickles(folder, with_labels),
    "pickles with arrays of numbers": lambda folder: as_pickles(
        folder,
        lambda c: c | {"class_dict": {k: np.array(v) for k, v in c["class_dict"].items()}},
    ),
    "channels first": lambda folder: as_pickles(
        folder, lambda c: c | {"image_data": c["image_data"].transpose(0, 3, 1, 2)}
    ),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_gives_the_same(tmp_path: Path, layout: str) -> None:
    prepare_mini_imagenet(tmp_path / "root", LAYOUTS[layout](tmp_path / "source"))
    for split, labels in SPLITS.items():
        data = load_dataset("mini-imagenet", split, root=tmp_path / "root")
        assert data.shape == (3, 84, 84)
        assert data.classes == tuple(sorted(labels))
        assert data.groups == ("mini-imagenet",)
        assert data.count.tolist() == [EACH] * len(labels)
        for c, label in enumerate(data.classes):
            for i in range(EACH):
                found = data.images[data.first[c] + i].permute(1, 2, 0).numpy()
                assert np.array_equal(found, picture(label, i))


def test_numbered_labels_are_told_apart_by_split(tmp_path: Path) -> None:
    def numbered(content: dict[str, Any]) -> dict[str, Any]:
        size = len(content["image_data"])
        return {"data": content["image_data"], "labels": np.arange(size) % 2}

    prepare_mini_imagenet(tmp_path / "root", as_pickles(tmp_path / "source", numbered))
    assert load_dataset("mini-imagenet", "val", root=tmp_path / "root").classes == (
        "val-0",
        "val-1",
    )


def test_other_sizes_and_colours(tmp_path: Path) -> None:
    source = as_csv_and_folder(tmp_path / "source")
    Image.new("L", (500, 333), 99).save(source / "images" / "n0200000000.jpg", "JPEG")
    Image.new("CMYK", (30, 40), (55, 155, 205, 0)).save(source / "images" / "n0200000001.jpg")
    prepare_mini_imagenet(tmp_path / "root", source)
    images = load_dataset("mini-imagenet", "val", root=tmp_path / "root").images
    val = load_dataset("mini-imagenet", "val", root=tmp_path / "root")
    grey, colour = (images[val.first[0] + i].flatten(1).float() for i in range(2))
    assert (grey - 99).abs().max() <= 1
    assert (colour - torch.tensor([[200.0], [100.0], [50.0]])).abs().max() <= 3


def test_no_source_and_no_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no download; give `source`"):
        prepare_mini_imagenet(tmp_path / "root")
    with pytest.raises(InputError, match="no known layout"):
        prepare_mini_imagenet(tmp_path / "root", tmp_path)
    with pytest.raises(InputError, match="absent is not a folder"):
        prepare_mini_imagenet(tmp_path / "root", tmp_path / "absent")


def edit(file: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda source: (source / file).write_text(change((source / file).read_text()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit("train.csv", lambda t: t + "gone.jpg,n01\n"),
            r"train\.csv line 14: names 'gone\.jpg'",
        ),
        (edit("train.csv", lambda t: t + "../val.csv,n01\n"), r"names '\.\./val\.csv'"),
        (
            edit("val.csv", lambda t: t + "n0100000000.jpg,n02\n"),
            r"'n0100000000\.jpg' a second time",
        ),
        (edit("test.csv", lambda t: t.replace(",n05", ",n01")), "'n01' is in train and in test"),
        (
            edit("val.csv", lambda t: t.replace("label", "class")),
            r"val\.csv: the first line must be",
        ),
        (edit("val.csv", lambda t: t + "n0200000009.jpg\n"), "line 6: a file name and a label"),
        (edit("val.csv", lambda t: t + '"open,n02\n'), r"val\.csv: not a readable CSV"),
        (lambda s: (s / "val.csv").write_bytes(b"\xff\xfe\0"), r"val\.csv: not a readable CSV"),
        (lambda s: (s / "val.csv").write_text("filename,label\n"), "split 'val' has no classes"),
        (lambda s: (s / "test.csv").unlink(), r"has train\.csv but no test\.csv"),
        (lambda s: (s / "images").rename(s / "pictures"), "but no images/ or images.zip"),
    ],
)
def test_damaged_tables_are_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    source = as_csv_and_folder(tmp_path / "source")
    damage(source)
    with pytest.raises(InputError, match=message) as error:
        prepare_mini_imagenet(tmp_path / "root", source)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "root").rglob("images-*"))


@pytest.mark.parametrize("layout", ["csv and folder", "csv and zip", "class folders"])
def test_unreadable_images_are_named_and_skipped_on_demand(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded

    def cut(label: str, i: int) -> bytes:
        data = whole(label, i)
        return data[: len(data) // 2] if (label, i) in (("n03", 1), ("n05", 0)) else data

    monkeypatch.setitem(globals(), "encoded", cut)
    source = LAYOUTS[layout](tmp_path / "source")
    name = "n03/1.png" if layout == "class folders" else "n0300000001.jpg"
    with pytest.raises(InputError, match=f"{name}: not a readable image: .*`skip_bad`"):
        prepare_mini_imagenet(tmp_path / "root", source)
    prepare_mini_imagenet(tmp_path / "root", source, skip_bad=True)
    said = capsys.readouterr().err
    assert name in said
    assert "left out 2 unreadable images" in said
    train = load_dataset("mini-imagenet", "train", root=tmp_path / "root")
    assert train.count.tolist() == [4, 3, 4]
    third = train.images[train.first[1] + 1].permute(1, 2, 0).numpy()
    assert np.array_equal(third, picture("n03", 2))


def test_a_class_without_a_readable_image(tmp_path: Path) -> None:
    source = as_class_folders(tmp_path / "source")
    for file in (source / "val" / "n02").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="no image of class 'n02'"):
        prepare_mini_imagenet(tmp_path / "root", source, skip_bad=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [c], "expected a dictionary, got list"),
        (lambda c: c | {"image_data": None}, r"must be \(N, H, W, 3\) uint8, got NoneType"),
        (lambda c: c | {"image_data": c["image_data"] / 255}, "float64"),
        (lambda c: c | {"image_data": c["image_data"][..., :2]}, r"got \(12, 84, 84, 2\) uint8"),
        (lambda c: {"image_data": c["image_data"]}, "'class_dict' .* or 'labels' .* is expected"),
        (lambda c: c | {"class_dict": {"a": [99]}}, "images 0 to 11 at most once, got 1 numbers"),
        (lambda c: c | {"class_dict": {"a": [-1]}}, "from -1 to -1"),
        (lambda c: c | {"class_dict": {"a": [0, 1], "b": [1]}}, "3 numbers .* 2 of them different"),
        (lambda c: c | {"class_dict": {"a": ["x"]}}, "is expected"),
        (lambda c: c | {"class_dict": {"a": []}}, "no image of class 'a'"),
        (lambda c: c | {"class_dict": {(1,): [0]}}, "is expected"),
        (lambda c: c | {"class_dict": {}}, "split 'train' has no classes"),
        (lambda c: c | {"class_dict": {"same": [0]}}, "class 'same' is in train and in val"),
        (lambda c: c | {"x": os.system}, "it asks for .*system; refused"),
    ],
)
def test_wrong_pickles_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    source = as_pickles(tmp_path / "source", change)
    with pytest.raises(InputError, match=message) as error:
        prepare_mini_imagenet(tmp_path / "root", source)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "root").rglob("images-*"))


def test_a_missing_pickle(tmp_path: Path) -> None:
    source = as_pickles(tmp_path / "source")
    (source / "mini-imagenet-cache-val.pkl").unlink()
    with pytest.raises(InputError, match=r"cache-train\.pkl but no mini-imagenet-cache-val\.pkl"):
        prepare_mini_imagenet(tmp_path / "root", source)


def test_the_real_25_classes(two_real_root: Path) -> None:
    parts = [load_dataset("mini-imagenet", s, root=two_real_root) for s in ("train", "val", "test")]
    assert [p.num_classes for p in parts] == [14, 6, 5]
    assert all((p.count == 500).all() for p in parts)
    assert len({c for p in parts for c in p.classes}) == 25
    batch = EpisodeSampler(parts[0], ways=5, shots=1, queries=15).sample(2)
    assert batch.query_x.shape == (2, 75, 3, 84, 84)
    # photographs: neither dark nor bright on the whole, and neighbouring pixels are alike
    assert 0.3 < batch.query_x.mean() < 0.6
    assert (batch.query_x.diff(dim=-1)).abs().mean() < 0.1
