"""The on-disk format: one memory-mapped uint8 array and one JSON index a data set.

``ROOT/NAME/images-<checksum>.npy`` holds all images ``(N, C, H, W)`` with each class contiguous;
``ROOT/NAME/index.json`` names the classes, their ranges, groups and splits, and carries the array's
file name and SHA-256 and a checksum of its own. Writers take turns by a lock on the folder, and the
index is renamed into place after the array: a reader sees a complete data set or none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gametalearn.errors import InputError, summary
from gametalearn.files import locked
from gametalearn.images import ClassImages

__all__ = [
    "PackedClass",
    "PackedWriter",
    "data_root",
    "is_packed",
    "packing",
    "read_or_build",
    "read_packed",
    "write_packed",
]

FORMAT = "gametalearn.packed/2"
Array = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class PackedClass:
    """One class of a packed data set: its name, group and number of consecutive images.

    ``split`` is the class's place in a split that the data set itself defines, or None.
    """

    name: str
    group: str
    count: int
    split: str | None = None


def data_root() -> Path:
    """``$GAMETALEARN_DATA``, or ``gametalearn`` in the user's cache folder."""
    given = os.environ.get("GAMETALEARN_DATA")
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "gametalearn"


class PackedWriter:
    """Takes the classes of a data set one after another and streams their images to a file.

    Made by `packing`. Memory is one class, whatever the data set.
    """

    def __init__(self, folder: Path, stream: BinaryIO, shape: tuple[int, int, int]) -> None:
        self._folder, self._stream, self._shape = folder, stream, shape
        self.classes: list[PackedClass] = []
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header so that the first dimension can grow in place
        shape = (sum(c.count for c in self.classes), *self._shape)
        spec = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, spec)

    def add(self, name: str, group: str, images: Array, split: str | None = None) -> None:
        """Append one class: ``images (n, C, H, W)`` uint8 of the data set's shape."""
        if images.dtype != np.uint8 or images.shape[1:] != self._shape:
            raise ValueError(
                f"images must be (n, C, H, W) = (n, *{self._shape}) uint8, "
                f"got {images.shape} {images.dtype}"
            )
        self.classes.append(PackedClass(name, group, len(images), split))
        with _writable(self._folder):
            self._stream.write(np.ascontiguousarray(images).data)

    def finish(self) -> None:
        """Give the file its final header and make it durable."""
        self._stream.seek(0)
        self._write_header()
        _sync(self._stream)


@contextlib.contextmanager
def packing(folder: Path, shape: tuple[int, int, int], **info: Any) -> Iterator[PackedWriter]:
    """Write a data set of ``(C, H, W) = shape`` images into ``folder``, all or nothing.

    Nothing is visible to readers before the block has ended well, and an error within it leaves
    what was there before. Another process that writes the same folder waits until this one is done.

    Args:
        folder: the data set's folder; made if absent.
        shape: (C, H, W) of every image.
        info: further JSON values for the index (source, seed, ...).

    Raises:
        InputError: the folder cannot be written (permissions, disk full).

    >>> with tempfile.TemporaryDirectory() as root:
    ...     with packing(Path(root) / "dots", shape=(1, 2, 2), source="doctest") as out:
    ...         out.add("black", "dots", np.zeros((3, 1, 2, 2), np.uint8))
    ...     images, records = read_packed(Path(root) / "dots", "dots")
    ...     tuple(images.images.shape), records
    ((3, 1, 2, 2), [PackedClass(name='black', group='dots', count=3, split=None)])
    """
    with _locked(folder), _packing(folder, shape, info) as writer:
        yield writer


@contextlib.contextmanager
def _packing(
    folder: Path, shape: tuple[int, int, int], info: dict[str, Any]
) -> Iterator[PackedWriter]:
    with _temporary(folder) as array, _temporary(folder) as text:
        with _closing(array.open("wb")) as stream:
            with _writable(folder):
                writer = PackedWriter(folder, stream, shape)
            yield writer
            with _writable(folder):
                writer.finish()
        with _writable(folder):
            digest = _file_digest(array)
            index: dict[str, Any] = {
                "format": FORMAT,
                "images": f"images-{digest[:16]}.npy",
                "sha256": digest,
                "info": info,
                "classes": [asdict(c) for c in writer.classes],
            }
            index["checksum"] = _index_digest(index)
            with text.open("wb") as stream:
                stream.write(json.dumps(index, indent=0).encode())
                _sync(stream)
            os.replace(array, folder / index["images"])
            os.replace(text, folder / "index.json")
            for old in folder.glob("images-*.npy"):
                if old.name != index["images"]:
                    with contextlib.suppress(OSError):  # Windows: still open in another process
                        old.unlink()


def write_packed(folder: Path, images: Array, classes: Sequence[PackedClass], **info: Any) -> None:
    """Write ``images (N, C, H, W)`` uint8, class after class in the order of ``classes``.

    `packing` does the same for a data set that is not in memory; folder, info and errors are as
    there. The counts of the classes sum to N.
    """
    total = sum(c.count for c in classes)
    if images.ndim != 4 or total != len(images):
        raise ValueError(f"the classes count {total} images, the array is {images.shape}")
    channels, height, width = images.shape[1:]
    with packing(folder, (channels, height, width), **info) as out:
        first = 0
        for c in classes:
            out.add(c.name, c.group, images[first : first + c.count], c.split)
            first += c.count


def read_packed(folder: Path, name: str, remedy: str = "") -> tuple[ClassImages, list[PackedClass]]:
    """Memory-map a packed data set; all its classes as one `ClassImages`, and their records.

    The checksum of the file is verified once a process.

    Args:
        folder: what `packing` wrote.
        name: the data set, for messages and `ClassImages.name`.
        remedy: what to do about damaged files, for the message.

    Raises:
        FileNotFoundError: nothing has been prepared in ``folder``.
        InputError: the files are of another format, or damaged.
    """
    images, records, _ = _read(folder, name, remedy)
    return images, records


def is_packed(folder: Path, name: str) -> bool:
    """Whether a data set is in ``folder``, complete and undamaged."""
    try:
        read_packed(folder, name)
    except (FileNotFoundError, InputError):
        return False
    return True


def read_or_build(
    folder: Path,
    name: str,
    shape: tuple[int, int, int],
    build: Callable[[PackedWriter], None],
    **info: Any,
) -> tuple[ClassImages, list[PackedClass]]:
    """Read a cached data set; build it where it is absent, damaged or made from other ``info``.

    Of several processes that need it at once, one builds and the others wait for it.

    Args:
        folder, name: as for `read_packed`.
        shape: (C, H, W) of every image.
        build: adds the classes to the writer that it is given.
        info: JSON values that identify the content (seed, version, list of files, ...).
    """

    def read() -> tuple[ClassImages, list[PackedClass]] | None:
        try:
            images, records, found = _read(folder, name)
        except (FileNotFoundError, InputError):
            return None
        return (images, records) if found == json.loads(json.dumps(info)) else None

    ready = read()
    if ready is None:
        with _locked(folder):
            ready = read()  # another process may have built it meanwhile
            if ready is None:
                with _packing(folder, shape, info) as writer:
                    build(writer)
    return ready or read_packed(folder, name)


def _read(
    folder: Path, name: str, remedy: str = ""
) -> tuple[ClassImages, list[PackedClass], dict[str, Any]]:
    remedy = remedy or f"delete {folder} and prepare '{name}' again"
    for attempt in range(8):
        text = (folder / "index.json").read_bytes()
        try:
            index = json.loads(text)
            if index["format"] != FORMAT:
                raise InputError(
                    f"{folder}: format {str(index['format'])[:40]!r}; this version reads {FORMAT!r}; {remedy}"
                )
            if _index_digest(index) != index["checksum"]:
                raise ValueError("the checksum of index.json does not match")
            array = _load(folder / index["images"], index["sha256"])
        except InputError:
            raise
        except FileNotFoundError as error:
            # a writer replaced index.json, then took the old images away: read the new index
            if attempt == 7 or (folder / "index.json").read_bytes() == text:
                raise InputError(f"{folder}: {index['images']} is missing; {remedy}") from error
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise InputError(f"{folder}: damaged ({summary(error)}); {remedy}") from error
        else:
            break
    records = [PackedClass(**record) for record in index["classes"]]
    count = torch.tensor([c.count for c in records], dtype=torch.int64)
    groups = tuple(dict.fromkeys(c.group for c in records))
    number = {g: i for i, g in enumerate(groups)}
    images = ClassImages(
        name=name,
        split="all",
        images=torch.from_numpy(array),
        first=count.cumsum(0) - count,
        count=count,
        classes=tuple(c.name for c in records),
        class_group=torch.tensor([number[c.group] for c in records]),
        groups=groups,
    )
    return images, records, index["info"]


def _load(file: Path, digest: str) -> Array:
    # The checksum is compared before numpy parses the file's header.
    status = file.stat()
    if _stamped_digest(file, (status.st_ino, status.st_size, status.st_mtime_ns)) != digest:
        raise ValueError(f"the checksum of {file.name} does not match")
    array: Array = np.load(file, mmap_mode="c", allow_pickle=False)
    return array


@functools.lru_cache(maxsize=16)
def _stamped_digest(file: Path, stamp: tuple[int, int, int]) -> str:
    return _file_digest(file)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _index_digest(index: dict[str, Any]) -> str:
    signed = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _closing(stream: BinaryIO) -> Iterator[BinaryIO]:
    """Close, without the error of a buffer that could not be written, which came up before."""
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; free some space, make the folder "
            "writable, or set GAMETALEARN_DATA to another folder"
        ) from error


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new file that is gone at the end, unless it has been renamed."""
    with _writable(folder):
        handle, name = tempfile.mkstemp(dir=folder, prefix=".packing-")
        os.close(handle)
        file = Path(name)
        file.chmod(0o644)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against other writers; what a killed writer left is removed."""
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    with locked(folder / ".lock") as alone:
        if alone:
            for stale in folder.glob(".packing-*"):
                stale.unlink(missing_ok=True)
        yield
