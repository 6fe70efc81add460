import io
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gametalearn.cli import main
from gametalearn.data import load_dataset, omniglot, prepare_omniglot
from gametalearn.data.omniglot import ALPHABETS, VALIDATION_ALPHABETS
from gametalearn.errors import InputError

# A miniature with the structure of the original: three small alphabets in each part.
SMALL = {
    "background": {"Aa": 2, "Bb": 3, "Cc": 2},
    "evaluation": {"Dd": 2, "Ee": 1},
}


def drawing(number: int) -> bytes:
    """A 105 x 105 1-bit PNG, white with a black bar whose place and width tell ``number``."""
    image = Image.new("1", (105, 105), 1)
    image.paste(0, (10 + number % 20 * 4, 20, 14 + number % 20 * 4, 40 + number % 3 * 20))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def miniature() -> Iterator[tuple[str, bytes]]:
    number = 0
    for part, alphabets in SMALL.items():
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                number += 1
                for i in range(1, 21):
                    name = (
                        f"images_{part}/{alphabet}/character{character:02}/{number:04}_{i:02}.png"
                    )
                    yield name, drawing(number + i)


def as_folder(folder: Path, leave_out: str = "nothing") -> Path:
    for name, data in miniature():
        if leave_out not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def as_zips(folder: Path, leave_out: str = "nothing", prefix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for part in SMALL:
        with zipfile.ZipFile(folder / f"images_{part}.zip", "w") as archive:
            for name, data in miniature():
                if f"_{part}/" in name and leave_out not in name:
                    archive.writestr(prefix + name, data)
            archive.writestr("__MACOSX/images_background/Aa/character01/._0001_01.png", b"x")
            archive.writestr("images_background/Aa/.DS_Store", b"x")
    return folder


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.cls is None:
        monkeypatch.setattr(omniglot, "ALPHABETS", SMALL)
        monkeypatch.setattr(omniglot, "VALIDATION_ALPHABETS", {"Bb"})


def test_the_table_of_alphabets_is_the_original_one() -> None:
    assert [len(part) for part in ALPHABETS.values()] == [30, 20]
    assert [sum(part.values()) for part in ALPHABETS.values()] == [964, 659]
    assert len(VALIDATION_ALPHABETS) == 5
    assert set(ALPHABETS["background"]) > VALIDATION_ALPHABETS


@pytest.mark.parametrize("layout", [as_folder, as_zips, lambda p: as_zips(p, prefix="omniglot/")])
def test_every_layout_gives_the_same(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    prepare_omniglot(tmp_path / "root", layout(tmp_path / "source"))
    train, val, test = (
        load_dataset("omniglot", s, root=tmp_path / "root") for s in ("train", "val", "test")
    )
    assert train.classes == ("Aa/character01", "Aa/character02", "Cc/character01", "Cc/character02")
    assert {val.groups[g] for g in val.class_group.tolist()} == {"Bb"}
    assert test.classes == ("Dd/character01", "Dd/character02", "Ee/character01")
    assert train.shape == (1, 28, 28)
    assert train.count.tolist() == [20] * 4
    # drawing i of a class lies at first + i, with high ink where the drawing is black
    number = int(test.first[2]) // 20 + 1
    for i in (0, 13):
        black = np.asarray(Image.open(io.BytesIO(drawing(number + i + 1)))) == 0
        # an area average is an independent reduction: 105 = 28 * 3.75
        area = black.repeat(4, 0).repeat(4, 1).reshape(28, 15, 28, 15).mean((1, 3))
        ink = test.take(test.first[2] + i)[0].numpy()
        assert np.abs(ink - area).mean() < 0.02
        assert np.corrcoef(ink.ravel(), area.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        ("Dd/character02", "1 of the 2 characters of alphabet Dd"),
        ("0003_07.png", "19 of the 20 drawings of Bb/character01"),
        ("Aa/", "0 of the 2 characters of alphabet Aa"),
    ],
)
@pytest.mark.parametrize("layout", [as_folder, as_zips])
def test_an_incomplete_source_is_named(
    tmp_path: Path, layout: Callable[[Path, str], Path], leave_out: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare_omniglot(tmp_path / "root", layout(tmp_path / "source", leave_out))
    assert not (tmp_path / "root").exists()


def test_a_foreign_alphabet_is_named(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source")
    (source / "images_evaluation/Dd").rename(source / "images_background/Dd")
    with pytest.raises(InputError, match="alphabet 'Dd'"):
        prepare_omniglot(tmp_path / "root", source)


def test_a_source_without_omniglot(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither images_background.zip nor .*`source`"):
        prepare_omniglot(tmp_path / "root", tmp_path)


def test_a_damaged_drawing_is_named(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source")
    path = source / "images_background/Bb/character02/0004_05.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"0004_05.png: not a readable image"):
        prepare_omniglot(tmp_path / "root", source)
    assert not list((tmp_path / "root/omniglot").glob("i*"))


def test_not_prepared_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gametalearn data prepare omniglot \[--source PATH\]"):
        load_dataset("omniglot", "train", root=tmp_path)


def test_damaged_names_the_command(tmp_path: Path) -> None:
    prepare_omniglot(tmp_path / "root", as_folder(tmp_path / "source"))
    next((tmp_path / "root/omniglot").glob("images*")).write_bytes(b"")
    with pytest.raises(InputError, match=r"damaged .*gametalearn data prepare omniglot"):
        load_dataset("omniglot", "train", root=tmp_path / "root")


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")

    def fetch(root: str, background: bool, download: bool) -> None:
        assert download
        (Path(root) / "omniglot-py").mkdir(exist_ok=True)
        if background:
            as_zips(Path(root) / "omniglot-py")

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(torchvision.datasets, "Omniglot", fetch)
    prepare_omniglot(tmp_path / "root")
    assert load_dataset("omniglot", "train", root=tmp_path / "root").num_classes == 4
    assert not list((tmp_path / "tmp").iterdir())


def test_no_network_names_the_source_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision = pytest.importorskip("torchvision")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", offline)
    with pytest.raises(InputError, match=r"no route to host.*--source FOLDER"):
        prepare_omniglot(tmp_path / "root")


def test_without_torchvision_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(InputError, match=r"pip install torchvision, or .*--source FOLDER"):
        prepare_omniglot(tmp_path / "root")


def test_what_is_prepared_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchvision = pytest.importorskip("torchvision")

    monkeypatch.setenv("GAMETALEARN_DATA", str(tmp_path / "root"))
    assert main(["data", "prepare", "omniglot", "--source", str(as_folder(tmp_path / "in"))]) == 0
    assert "already prepared" not in capsys.readouterr().out
    index = tmp_path / "root" / "omniglot" / "index.json"
    written = index.stat().st_mtime_ns

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", offline)
    assert main(["data", "prepare", "omniglot"]) == 0
    out = capsys.readouterr().out
    assert "omniglot: 10 classes, 200 images" in out
    assert "already prepared, and left as it is" in out
    assert index.stat().st_mtime_ns == written
    index.write_text("{}")  # what is damaged is no data set: it is fetched again
    assert main(["data", "prepare", "omniglot"]) == 2
    assert "no route to host" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real(omniglot_root: Path) -> Path:
    return omniglot_root


class TestReal:
    """All of Omniglot."""

    @pytest.mark.parametrize(
        ("class_split", "characters", "alphabets"),
        [("lake", (883, 81, 659), (25, 5, 20)), ("maml", (1100, 100, 423), None)],
    )
    def test_splits(
        self, real: Path, class_split: str, characters: tuple[int, ...], alphabets: Any
    ) -> None:
        parts = [
            load_dataset("omniglot", split, root=real, class_split=class_split)
            for split in ("train", "val", "test")
        ]
        assert tuple(p.num_classes for p in parts) == characters
        assert len({c for p in parts for c in p.classes}) == 1623
        assert all((p.count == 20).all() for p in parts)
        used = [set(p.class_group.tolist()) for p in parts]
        if alphabets:
            assert tuple(len(u) for u in used) == alphabets
            assert len(set.union(*used)) == 50
        else:
            assert all(len(u) > 30 for u in used)
        again = load_dataset("omniglot", "train", root=real, class_split=class_split)
        assert again.classes == parts[0].classes

    def test_every_drawing_keeps_its_strokes(self, real: Path) -> None:
        images = load_dataset("omniglot", "train", root=real).images
        assert images.shape == (32460, 1, 28, 28)
        brightest = images.flatten(1).max(1).values
        assert brightest.min() > 127
        assert brightest.float().mean() > 230
        share = images.float().mean() / 255
        assert 0.05 < share < 0.15  # paper: white

    def test_rotations_and_conversion(self, real: Path) -> None:
        turned = load_dataset("omniglot", "test", root=real, rotations=True)
        assert turned.num_classes == 4 * 659
        first = turned.take(turned.first[[0, 659]] + 3)
        assert torch.equal(torch.rot90(first[0], 1, (1, 2)), first[1])
        large = load_dataset("omniglot", "val", root=real, image_size=84, channels=3)
        assert large.shape == (3, 84, 84)
