"""Files of a source of images, read by name from a folder or a zip archive.

Nothing is ever extracted: members are read into memory, and only those that the archive lists under
a plain relative path, so no name can reach a file outside it.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Protocol, Self

from gametalearn.errors import InputError, summary

__all__ = ["OTHER_IMAGES", "FolderFiles", "SourceFiles", "ZipFiles", "is_image_name"]

MAX_FILE = 64 * 2**20  # bytes of one image file; ImageNet's largest have 16 MiB
MAX_TOTAL = 64 * 2**30  # bytes of all members of an archive; mini-ImageNet's originals have 7 GiB
MAX_RATIO = 200  # uncompressed to compressed, of members above 1 MiB: images hardly compress

IMAGE_SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg"})
IMAGE_SUFFIXES |= {".pjp", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"}
IMAGE_SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"}

OTHER_IMAGES = frozenset(
    {".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga"}
)
OTHER_IMAGES |= {".ico", ".eps", ".exr", ".hdr", ".dng", ".raw", ".cr2", ".nef", ".arw", ".npy"}
"""Ends of the names of images that are not read."""


def is_image_name(name: str) -> bool:
    """Whether a file's name ends like an image's and is not hidden."""
    return not is_hidden(name) and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden, or one of those that macOS adds to archives."""
    return any(p.startswith(".") or p == "__MACOSX" for p in PurePosixPath(name).parts)


class SourceFiles(Protocol):
    """What `FolderFiles` and `ZipFiles` share."""

    where: str

    def names(self) -> list[str]:
        """The image files, sorted, as relative paths with ``/``."""
        ...

    def read(self, name: str) -> bytes:
        """One file of `names`; `InputError` names it if it cannot be read."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class FolderFiles:
    """The image files below a folder; links are followed, but not in a circle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def names(self) -> list[str]:
        """The image files, sorted, as relative paths with ``/``."""
        return sorted(filter(is_image_name, self._walk()))

    def visible(self) -> list[str]:
        """The image files and all others that are not hidden, likewise."""
        return sorted(name for name in self._walk() if not is_hidden(name))

    def _walk(self) -> Iterator[str]:
        def refuse(error: OSError) -> None:
            raise InputError(f"{error.filename}: cannot be listed: {error.strerror}") from error

        for folder, below, files in os.walk(self.folder, onerror=refuse, followlinks=True):
            here = Path(folder).resolve()
            below[:] = [b for b in below if not here.is_relative_to((here / b).resolve())]
            base = Path(folder).relative_to(self.folder)
            yield from ((base / file).as_posix() for file in files)

    def read(self, name: str) -> bytes:
        """One file of `names`; `InputError` names it if it cannot be read."""
        return read_file(self.folder / name)


def read_file(path: Path) -> bytes:
    """The bytes of an ordinary file of at most `MAX_FILE` bytes; `InputError` names it otherwise."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise InputError(f"{path}: not a regular file")
        if status.st_size > MAX_FILE:
            raise InputError(f"{path}: has {status.st_size} bytes; at most {MAX_FILE} are read")
        return path.read_bytes()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{path}: cannot be read: {summary(error)}") from error


class ZipFiles:
    """The image files in a zip archive.

    Raises:
        InputError: not a zip archive; a member whose path leads out of it, or that is a link; sizes
            that only a decompression bomb has.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            size = path.stat().st_size
            self._zip = zipfile.ZipFile(path)
        except Exception as error:  # a damaged directory raises anything from struct.error on
            raise InputError(f"{path}: not a readable zip archive: {summary(error)}") from error
        try:
            self._check(self._zip.infolist(), size)
        except InputError:
            self._zip.close()
            raise
        self._members = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}

    def _check(self, members: list[zipfile.ZipInfo], size: int) -> None:
        for info in members:
            member = f"{self.where}: member {info.filename!r}"
            parts = info.filename.replace("\\", "/").split("/")
            if ".." in parts or parts[0] == "" or ":" in parts[0] or "\\" in info.filename:
                raise InputError(f"{member} has a path that leads out of the archive; refused")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise InputError(f"{member} is a link; refused")
            if info.file_size > MAX_FILE:
                raise InputError(
                    f"{member} has {info.file_size} bytes; at most {MAX_FILE} are read"
                )
            if info.file_size > max(2**20, MAX_RATIO * info.compress_size):
                raise InputError(
                    f"{member} unpacks {info.compress_size} bytes to {info.file_size}, more than "
                    f"{MAX_RATIO} times; refused as a decompression bomb"
                )
        if sum(info.compress_size for info in members) > size:
            raise InputError(f"{self.where}: its members overlap; refused as a decompression bomb")
        if (total := sum(info.file_size for info in members)) > MAX_TOTAL:
            raise InputError(
                f"{self.where}: unpacks to {total} bytes; at most {MAX_TOTAL} are read"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def names(self) -> list[str]:
        """The image files, sorted, as relative paths with ``/``."""
        return sorted(filter(is_image_name, self._members))

    def read(self, name: str) -> bytes:
        """One file of `names`; `InputError` names it if it cannot be read."""
        try:
            return self._zip.read(self._members[name])
        except Exception as error:  # zlib, lzma, encryption, CRC, ...: each has its own
            raise InputError(f"{self.where}: {name}: cannot be read: {summary(error)}") from error
