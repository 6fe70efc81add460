import os
import stat
import zipfile
from pathlib import Path

import pytest

from gametalearn.data import archives
from gametalearn.data.archives import FolderFiles, ZipFiles, is_image_name, read_file
from gametalearn.errors import InputError


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_names_and_contents(tmp_path: Path) -> None:
    members = {"b/2.png": b"two", "a/1.JPG": b"one", "a/notes.txt": b"-", "a/.x.png": b"-"}
    path = zipped(tmp_path / "x.zip", members | {"__MACOSX/a/1.jpg": b"-", "empty/": b""})
    with ZipFiles(path) as files:
        assert files.names() == ["a/1.JPG", "b/2.png"]
        assert files.read("b/2.png") == b"two"
    for name, data in members.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    with FolderFiles(tmp_path / "d") as folder:
        assert folder.names() == ["a/1.JPG", "b/2.png"]
        assert folder.read("a/1.JPG") == b"one"


@pytest.mark.parametrize(
    "name",
    ["../out.png", "a/../../out.png", "/etc/out.png", "..\\out.png", "C:/out.png", "a\\b.png"],
)
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # not cleaned as a constructor argument is
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, b"data")
    with pytest.raises(InputError, match="leads out of the archive"):
        ZipFiles(tmp_path / "x.zip")
    assert [f.name for f in tmp_path.iterdir()] == ["x.zip"]


def test_links_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a/link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="is a link"):
        ZipFiles(tmp_path / "x.zip")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "ratio.zip", {"a.png": bytes(2**22)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"a\.png.*decompression bomb"):
        ZipFiles(path)
    monkeypatch.setattr(archives, "MAX_FILE", 1000)
    path = zipped(tmp_path / "large.zip", {"a.png": os.urandom(1001)})
    with pytest.raises(InputError, match="1001 bytes; at most 1000"):
        ZipFiles(path)
    monkeypatch.setattr(archives, "MAX_TOTAL", 1500)
    path = zipped(tmp_path / "total.zip", {f"{i}.png": os.urandom(800) for i in range(2)})
    with pytest.raises(InputError, match="unpacks to 1600 bytes; at most 1500"):
        ZipFiles(path)


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    # the directory lists one member a hundred times (Fifield 2019)
    path = zipped(tmp_path / "x.zip", {"a.png": os.urandom(5000)})
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = data[start:end]
    entries = b"".join(entry.replace(b"a.png", b"%05d" % i) for i in range(100))
    tail = bytearray(data[end:])
    tail[8:12] = (100).to_bytes(2, "little") * 2
    tail[12:16] = len(entries).to_bytes(4, "little")
    path.write_bytes(data[:start] + entries + tail)
    with pytest.raises(InputError, match="overlap"):
        ZipFiles(path)


def test_a_member_that_says_less_than_it_holds(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    path.write_bytes(data.replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with ZipFiles(path) as files, pytest.raises(InputError, match=r"a\.png: cannot be read"):
        files.read("a.png")


def test_damaged_members_and_archives_are_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a/1.png": os.urandom(500)})
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with ZipFiles(path) as files, pytest.raises(InputError, match=r"a/1\.png: cannot be read"):
        files.read("a/1.png")
    path.write_bytes(data[:200])
    with pytest.raises(InputError, match=r"x\.zip: not a readable zip"):
        ZipFiles(path)
    with pytest.raises(InputError, match="not a readable zip"):
        ZipFiles(tmp_path / "absent.zip")


def test_encrypted_members_are_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": b"secret"})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with ZipFiles(path) as files, pytest.raises(InputError, match="encrypted"):
        files.read("a.png")


def test_only_ordinary_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        read_file(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be read"):
        read_file(tmp_path / "dangling.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_file(tmp_path / "nu\0ll.png")
    (tmp_path / "large.png").write_bytes(bytes(20))
    monkeypatch.setattr(archives, "MAX_FILE", 19)
    with pytest.raises(InputError, match="20 bytes; at most 19"):
        read_file(tmp_path / "large.png")


def test_image_names() -> None:
    assert is_image_name("a/b.PNG")
    assert is_image_name("b.jpeg")
    for name in ("a/b.txt", "a/.b.png", ".cache/b.png", "png", "__MACOSX/b.png", "a/b.png.zip"):
        assert not is_image_name(name)


def test_the_archive_is_closed(tmp_path: Path) -> None:
    with ZipFiles(zipped(tmp_path / "x.zip", {"a.png": b"a"})) as files:
        pass
    with pytest.raises(InputError):
        files.read("a.png")
