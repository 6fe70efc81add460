"""Checkpoints: written atomically, checked before they are read, loaded without code."""

from __future__ import annotations

import errno
import io
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from gametalearn.errors import InputError, summary

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["FORMAT", "load_checkpoint", "lock_folder", "replacing", "save_checkpoint"]

FORMAT = "gametalearn.checkpoint/1"


@contextmanager
def lock_folder(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Keep other processes that call this out of ``folder``; the system ends it with the process.

    What a process that was killed in the middle of `replacing` left behind is removed.

    Args:
        folder: it must exist.
        patience: seconds to wait for another process to go.

    Raises:
        InputError: another process holds the folder.
    """
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        until = time.monotonic() + patience
        while handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break  # a file system without locks
                if time.monotonic() > until:
                    raise InputError(
                        f"{folder}: another process is at work there; wait for it, or choose "
                        "another --out"
                    ) from None
            time.sleep(0.05)
        for leftover in folder.glob(f".*{_TEMPORARY}"):
            with suppress(OSError):
                leftover.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)


_TEMPORARY = ".unfinished"


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


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain values) atomically."""
    with replacing(path) as stream:
        failed: list[OSError] = []
        try:
            torch.save({"format": FORMAT, **content}, cast(IO[bytes], _Noting(stream, failed)))
        except RuntimeError as error:  # torch's zip writer hides what the disk said
            raise (failed or [OSError(f"torch.save: {summary(error)}")])[0] from error


class _Noting(io.RawIOBase):
    """A stream that notes the error of a write."""

    def __init__(self, stream: IO[bytes], failed: list[OSError]) -> None:
        self._stream, self._failed = stream, failed

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self._failed.append(error)
            raise

    def flush(self) -> None:
        """Left to the stream's owner."""


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, with ``weights_only=True``.

    Every member's CRC is checked first, since a flipped bit otherwise loads silently.

    Raises:
        InputError: no such file, damaged, or of another version; the message names the file.
    """
    damaged = f"{path}: damaged or not a checkpoint; use another one (best.pt lies beside it)"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(m.compress_type != zipfile.ZIP_STORED for m in archive.infolist()):
                raise InputError(f"{damaged} (compressed)")
            if (member := archive.testzip()) is not None:
                raise InputError(f"{damaged} (checksum of {member})")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except InputError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged header leads to
        raise InputError(f"{damaged} ({error})") from error
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler likewise; nothing is executed
        raise InputError(f"{damaged} ({str(error).splitlines()[0][:120]})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise InputError(f"{path}: checkpoint format {version!r}, this version reads '{FORMAT}'")
    return content  # type: ignore[no-any-return]
