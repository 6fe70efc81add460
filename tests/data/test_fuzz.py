"""Damaged and hostile files give a clear error or a correct result: nothing else, and no stray file.

100 cases of each kind run always; ``pytest -m slow`` runs 1,000 of each. Derandomised, so that every
run tries the same ones.
"""

import datetime
import io
import os
import pickle
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gametalearn.data import load_dataset, packed, prepare_mini_imagenet
from gametalearn.data.archives import ZipFiles
from gametalearn.data.decode import decode
from gametalearn.data.packed import PackedClass, read_packed, write_packed
from gametalearn.data.pickles import load_arrays
from gametalearn.errors import InputError

SPLITS = {"train": ("n1", "n2"), "val": ("n3",), "test": ("n4",)}
DEADLINE = datetime.timedelta(seconds=20)  # a hang, on a machine however busy


def few(max_examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=max_examples, derandomize=True, deadline=DEADLINE, database=None)


# ---------------------------------------------------------------------------------------------
# mutations

Edits = list[tuple[str, int, int]]
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "set", "number", "delete", "insert", "repeat", "cut"]),
        st.randoms(use_true_random=False).map(lambda random: random.randrange(2**32)),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=3,
)


def mutated(data: bytes, edits: Edits) -> bytes:
    for kind, where, value in edits:
        at, length = where % max(len(data), 1), 1 + value % 16
        match kind:
            case "flip":
                middle = bytes([data[at] ^ 1 << value % 8]) if data else b""
                data = data[:at] + middle + data[at + 1 :]
            case "set":
                data = data[:at] + bytes([value % 256]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "delete":
                data = data[:at] + data[at + length :]
            case "insert":
                data = data[:at] + value.to_bytes(4, "little") * (length // 4 + 1) + data[at:]
            case "repeat":
                data = data[:at] + data[at : at + length] * (1 + value % 50) + data[at + length :]
            case "number":
                data = data[:at] + value.to_bytes(4, "little") + data[at + 4 :]
    return data


@contextmanager
def sandbox() -> Iterator[Path]:
    """A folder in which only ``source`` and ``root`` may come to be; errors are one line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        message = ""
        try:
            yield folder
        except InputError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 2000
        assert {f.name for f in folder.iterdir()} <= {"source", "root"}


# ---------------------------------------------------------------------------------------------
# what is mutated


def picture(seed: int, kind: str = "PNG", mode: str = "RGB", side: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


PICTURES = [
    picture(0, "PNG"),
    picture(1, "PNG", "P"),
    picture(2, "PNG", "1", side=40),
    picture(3, "JPEG"),
    picture(4, "JPEG", "CMYK"),
    picture(5, "GIF", "P"),
    picture(6, "BMP"),
    picture(7, "TIFF"),
    picture(8, "WEBP"),
    picture(9, "PPM"),
]


def csv_source(folder: Path) -> Path:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, labels in SPLITS.items():
            lines = ["filename,label"]
            for label in labels:
                for i in range(2):
                    name = f"{label}{i:02}.png"
                    archive.writestr(f"images/{name}", picture(i))
                    lines.append(f"{name},{label}")
            (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def pickle_source(folder: Path, protocol: int) -> Path:
    folder.mkdir(parents=True)
    for split, labels in SPLITS.items():
        images = np.random.default_rng(0).integers(0, 256, (len(labels) * 2, 4, 4, 3), np.uint8)
        numbers = {label: [2 * i, 2 * i + 1] for i, label in enumerate(labels)}
        content = {"image_data": images, "class_dict": numbers}
        path = folder / f"mini-imagenet-cache-{split}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
    return folder


def prepared(folder: Path) -> None:
    """Prepare the data set from ``source``; what comes out is whole."""
    prepare_mini_imagenet(folder / "root", folder / "source")
    for split in SPLITS:
        data = load_dataset("mini-imagenet", split, root=folder / "root")
        assert data.num_classes >= 1
        assert data.count.min() >= 1
        last = data.first + data.count - 1
        assert data.take(last).shape == (data.num_classes, 3, 84, 84)


def try_image(edits: Edits, choice: int) -> None:
    with sandbox():
        image = decode(mutated(PICTURES[choice % len(PICTURES)], edits), "picture")
        assert image.mode in ("L", "RGB")
        assert np.asarray(image).dtype == np.uint8


def try_zip(edits: Edits, choice: int) -> None:
    with sandbox() as folder:
        path = csv_source(folder / "source") / "images.zip"
        data = path.read_bytes()
        # half of the edits go to the directory at the end, which a random place seldom hits
        start = data.index(b"PK\x01\x02") if choice % 2 else 0
        path.write_bytes(data[:start] + mutated(data[start:], edits))
        prepared(folder)


def try_csv(edits: Edits, choice: int) -> None:
    with sandbox() as folder:
        path = csv_source(folder / "source") / ("train.csv", "val.csv", "test.csv")[choice % 3]
        path.write_bytes(mutated(path.read_bytes(), edits))
        prepared(folder)


def try_pickle(edits: Edits, choice: int) -> None:
    with sandbox() as folder:
        source = pickle_source(folder / "source", protocol=choice % 6)
        path = source / "mini-imagenet-cache-train.pkl"
        path.write_bytes(mutated(path.read_bytes(), edits))
        prepared(folder)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def try_evil_pickle(edits: Edits, choice: int) -> None:
    with sandbox() as folder:
        (folder / "source").mkdir()
        path = folder / "source" / "x.pkl"
        content = {"a": np.arange(3), "b": Touch(folder / "stray"), "c": np.arange(3)}
        path.write_bytes(mutated(pickle.dumps(content, choice % 6), edits))
        load_arrays(path)


def try_packed(edits: Edits, choice: int) -> None:
    with sandbox() as folder:
        images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 3, 2, 2)
        records = [PackedClass("a", "g", 2), PackedClass("b", "g", 3)]
        write_packed(folder / "root", images, records)
        pattern = ("index.json", "images-*.npy")[choice % 2]
        path = next((folder / "root").glob(pattern))
        path.write_bytes(mutated(path.read_bytes(), edits))
        packed._stamped_digest.cache_clear()
        found, classes = read_packed(folder / "root", "d")
        assert classes == records  # noticed, or unchanged
        assert np.array_equal(found.images.numpy(), images)


KINDS = {
    "image": try_image,
    "zip": try_zip,
    "csv": try_csv,
    "pickle": try_pickle,
    "evil pickle": try_evil_pickle,
    "packed": try_packed,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_some(kind: str) -> None:
    few(100)(given(_EDITS, st.integers(0, 1000))(KINDS[kind]))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_many(kind: str) -> None:
    few(1000)(given(_EDITS, st.integers(0, 1000))(KINDS[kind]))()


# ---------------------------------------------------------------------------------------------
# hostile, not damaged: made of the right words in the wrong order

_PARTS = st.sampled_from(["..", ".", "", "a", "images", "C:", "/", "\\", "x.png", "\0", "é", "~"])
_MEMBERS = st.lists(
    st.tuples(
        st.lists(_PARTS, min_size=1, max_size=5).map("/".join),
        st.sampled_from([stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, 0]),
        st.binary(max_size=40),
    ),
    max_size=6,
)


@few(200)
@given(_MEMBERS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives(members: list[tuple[str, int, bytes]]) -> None:
    with sandbox() as folder:
        (folder / "source").mkdir()
        path = folder / "source" / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, kind, data in members:
                info = zipfile.ZipInfo("x")
                info.filename, info.external_attr = name, kind << 16
                archive.writestr(info, data)
        with ZipFiles(path) as files:
            for name in files.names():
                assert ".." not in name.split("/")
                assert not name.startswith("/")
                assert isinstance(files.read(name), bytes)


_WORDS = st.sampled_from(
    [
        *(
            bytes([code])
            for code in b"(.012FIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x82\x85\x86\x87"
        ),
        *(
            bytes([code])
            for code in b"\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96"
        ),
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy._core.multiarray\nscalar\n",
        b"cnumpy._core.numeric\n_frombuffer\n",
        b"ccollections\nOrderedDict\n",
        b"c_codecs\nencode\n",
        b"cos\nmkdir\n",
        b"cbuiltins\neval\n",
        b"S'u1'\n",
        b"S'latin1'\n",
        b"U\x03abc",
        b"K\x03",
        b"I3\n",
        b"\x85",
        b"tR",
        b"tb",
        b"\x94",
        b"h\x00",
    ]
)


def hostile_pickle(words: list[bytes]) -> None:
    with sandbox() as folder:
        (folder / "source").mkdir()
        path = folder / "source" / "x.pkl"
        path.write_bytes(b"".join(words) + b".")
        load_arrays(path)


def test_some_hostile_pickles() -> None:
    few(300)(given(st.lists(_WORDS, min_size=1, max_size=25))(hostile_pickle))()


@pytest.mark.slow
def test_many_hostile_pickles() -> None:
    few(5000)(given(st.lists(_WORDS, min_size=1, max_size=40))(hostile_pickle))()


def test_the_unmutated_sources_are_good(tmp_path: Path) -> None:
    csv_source(tmp_path / "source")
    prepared(tmp_path)
    for protocol in range(6):
        shutil.rmtree(tmp_path / "source")
        pickle_source(tmp_path / "source", protocol)
        prepared(tmp_path)
    for data in PICTURES:
        decode(data, "picture")
