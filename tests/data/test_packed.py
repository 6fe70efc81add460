import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gametalearn.data import packed
from gametalearn.data.packed import (
    PackedClass,
    PackedWriter,
    packing,
    read_or_build,
    read_packed,
    write_packed,
)
from gametalearn.errors import InputError

CLASSES = [PackedClass("a", "x", 3), PackedClass("b", "y", 2, "test"), PackedClass("ç", "x", 1)]


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 2, 4, 5), dtype=np.uint8)


def test_round_trip(tmp_path: Path) -> None:
    write_packed(tmp_path / "d", pixels(), CLASSES, source="here")
    images, records = read_packed(tmp_path / "d", "d")
    assert records == CLASSES
    assert np.array_equal(images.images.numpy(), pixels())
    assert images.first.tolist() == [0, 3, 5]
    assert images.count.tolist() == [3, 2, 1]
    assert images.classes == ("a", "b", "ç")
    assert images.groups == ("x", "y")
    assert images.class_group.tolist() == [0, 1, 0]


def test_streaming_writes_the_same_file(tmp_path: Path) -> None:
    write_packed(tmp_path / "whole", pixels(), CLASSES)
    with packing(tmp_path / "stream", (2, 4, 5)) as out:
        for record, images in zip(CLASSES, np.split(pixels(), [3, 5]), strict=True):
            out.add(record.name, record.group, images, record.split)
    names = [next((tmp_path / d).glob("images-*.npy")) for d in ("whole", "stream")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert np.array_equal(np.load(names[0]), pixels())


def test_the_reader_cannot_change_the_file(tmp_path: Path) -> None:
    write_packed(tmp_path, pixels(), CLASSES)
    images, _ = read_packed(tmp_path, "d")
    images.images.zero_()
    assert np.array_equal(read_packed(tmp_path, "d")[0].images.numpy(), pixels())


def test_nothing_there_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "absent", "d")


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    write_packed(tmp_path, pixels(), CLASSES)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def half() -> None:
        with packing(tmp_path, (1, 1, 1)) as out:
            out.add("z", "z", np.zeros((9, 1, 1, 1), np.uint8))
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_new_version_takes_the_old_one_away(tmp_path: Path) -> None:
    write_packed(tmp_path, pixels(0), CLASSES)
    (tmp_path / ".packing-stale").write_bytes(b"left by a killed process")
    write_packed(tmp_path, pixels(1), CLASSES)
    assert len(list(tmp_path.glob("images-*.npy"))) == 1
    assert not list(tmp_path.glob(".packing-*"))
    assert np.array_equal(read_packed(tmp_path, "d")[0].images.numpy(), pixels(1))


@pytest.mark.parametrize("file", ["index.json", "images"])
def test_every_flipped_byte_is_noticed(tmp_path: Path, file: str) -> None:
    write_packed(tmp_path, pixels(), CLASSES)
    path = next(tmp_path.glob(f"{file}*"))
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        packed._stamped_digest.cache_clear()  # the clock may be too coarse for the stamp
        try:
            images, records = read_packed(tmp_path, "d", remedy="do this")
        except InputError as error:
            message = str(error)
        else:  # white space or the like in the JSON
            assert records == CLASSES
            assert np.array_equal(images.images.numpy(), pixels())
            continue
        assert "do this" in message
        assert "\n" not in message


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100000, '{"format": "other/9"}', '"format"'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match="prepare 'd' again"):
        read_packed(tmp_path, "d")


def test_truncated_and_missing_images(tmp_path: Path) -> None:
    write_packed(tmp_path, pixels(), CLASSES)
    path = next(tmp_path.glob("images*"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="checksum"):
        read_packed(tmp_path, "d")
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        read_packed(tmp_path, "d")


def test_a_reader_survives_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is read, then replaced together with the images that it names."""
    write_packed(tmp_path, pixels(0), CLASSES)
    load = packed._load

    def replaced_first(file: Path, digest: str) -> np.ndarray:
        monkeypatch.setattr(packed, "_load", load)
        write_packed(tmp_path, pixels(1), CLASSES)
        return load(file, digest)

    monkeypatch.setattr(packed, "_load", replaced_first)
    assert np.array_equal(read_packed(tmp_path, "d")[0].images.numpy(), pixels(1))


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got"), packing(tmp_path, (1, 2, 2)) as out:
        out.add("a", "a", np.zeros((3, 2, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="count 6"):
        write_packed(tmp_path, pixels()[:5], CLASSES)


def test_read_or_build_builds_when_it_must(tmp_path: Path) -> None:
    calls = []

    def load(seed: int) -> int:
        def build(out: PackedWriter) -> None:
            calls.append(seed)
            out.add("a", "a", np.full((4, 1, 2, 2), seed, np.uint8))

        images, records = read_or_build(tmp_path, "d", (1, 2, 2), build, seed=seed, size=(2, 2))
        assert records == [PackedClass("a", "a", 4)]
        return int(images.images.max())

    assert [load(1), load(1), load(2), load(2)] == [1, 1, 2, 2]
    assert calls == [1, 2]
    next(tmp_path.glob("images*")).write_bytes(b"damaged")
    assert load(2) == 2
    (tmp_path / "index.json").write_text("{}")
    assert load(2) == 2
    assert calls == [1, 2, 2, 2]


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write to .*file.*GAMETALEARN_DATA"):
        write_packed(tmp_path / "file" / "d", pixels(), CLASSES)


@pytest.mark.parametrize("count", [1, 100000])
def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path, count: int) -> None:
    resource = pytest.importorskip("resource")
    write_packed(tmp_path, pixels(), CLASSES)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120, limits[1]))  # a file header has 128 bytes
    try:
        with pytest.raises(InputError, match=r"cannot write to .*File too large"):
            write_packed(
                tmp_path, np.zeros((count, 1, 2, 2), np.uint8), [PackedClass("a", "a", count)]
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


PROCESS = """
import sys, time
from pathlib import Path
import numpy as np, torch
from gametalearn.data.packed import PackedClass, read_or_build, read_packed, write_packed

torch.set_num_threads(1)
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
(folder / f"ready{seed}").touch()
while len(list(folder.glob("ready*"))) < 3:
    time.sleep(0.001)
"""
WRITES_AND_READS = """
for turn in range(30):
    value = 10 * seed + turn % 3
    images = np.full((20, 1, 28, 28), value, np.uint8)
    write_packed(folder / "d", images, [PackedClass(str(value), "g", 20)])
    found, records = read_packed(folder / "d", "d")
    assert (found.images == int(records[0].name)).all()
"""
BUILDS = """
def build(out):
    with (folder / "builds").open("a") as stream:
        stream.write("x")
    time.sleep(0.2)  # long enough for the others to come
    out.add("a", "g", np.full((4, 1, 2, 2), 7, np.uint8))

images, _ = read_or_build(folder / "d", "d", (1, 2, 2), build, value=7)
assert (images.images == 7).all()
"""


def _at_once(folder: Path, code: str) -> None:
    """Three processes side by side, which start together and all end well."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROCESS + code, str(folder)]
    processes = [
        subprocess.Popen([*command, str(seed)], env=environment, stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    assert [process.communicate(timeout=120)[1] for process in processes] == [""] * 3
    assert [process.returncode for process in processes] == [0] * 3


def test_processes_that_write_and_read_at_once(tmp_path: Path) -> None:
    _at_once(tmp_path, WRITES_AND_READS)
    names = sorted(f.name for f in (tmp_path / "d").iterdir())
    assert len(names) == 3  # .lock, the images, the index
    assert json.loads((tmp_path / "d" / "index.json").read_text())["images"] in names


def test_one_of_several_processes_builds(tmp_path: Path) -> None:
    _at_once(tmp_path, BUILDS)
    assert (tmp_path / "builds").read_text() == "x"
