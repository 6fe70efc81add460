"""Files that several processes share: written completely or not at all, folders held against others."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gametalearn.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: files are still renamed into place, but nobody is kept out
    fcntl = None  # type: ignore[assignment]

__all__ = ["held", "locked", "make_folder", "replacing", "write_json"]

_TEMPORARY = ".unfinished"


@contextmanager
def locked(place: Path, patience: float | None = None) -> Iterator[bool]:
    """Hold a file or folder against others that call this; the system lets go with the process.

    Args:
        place: it must exist.
        patience: seconds to wait for another process; None waits for ever.

    Yields:
        Whether it is held: False on a file system without locks.

    Raises:
        TimeoutError: another process holds it.
    """
    if fcntl is None:
        yield False  # type: ignore[unreachable]
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        yield _lock(handle, patience)
    finally:
        os.close(handle)


def _lock(handle: int, patience: float | None) -> bool:
    until = None if patience is None else time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if until is None else fcntl.LOCK_NB))
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if until is not None and time.monotonic() > until:
                raise TimeoutError from None
        time.sleep(0.05)


@contextmanager
def held(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Keep other processes that call this out of ``folder``, which must exist.

    What a process that was killed in the middle of `replacing` left behind is removed.

    Args:
        folder: a run's folder.
        patience: seconds to wait for another process to go.

    Raises:
        InputError: another process holds the folder.
    """
    try:
        with locked(folder, patience):
            for leftover in folder.glob(f".*{_TEMPORARY}"):
                with suppress(OSError):
                    leftover.unlink()
            yield
    except TimeoutError:
        raise InputError(
            f"{folder}: another process is using it; wait until it ends, or choose another `out`"
        ) from None


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A stream that takes ``target``'s place when it has been written and synced, or never.

    Raises:
        InputError: the disk is full, or the folder cannot be written; ``target`` is as it was.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=_TEMPORARY
        )
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror or error}); what was there is unchanged"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        InputError: it cannot be made; it may be a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror or error})") from error


def write_json(file: Path, content: Any, indent: int | None = None) -> None:
    """Write JSON without NaN, atomically."""
    with replacing(file) as stream:
        stream.write(json.dumps(content, indent=indent, allow_nan=False).encode() + b"\n")
