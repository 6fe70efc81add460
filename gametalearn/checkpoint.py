"""Checkpoints: written atomically, checked before they are read, loaded without code."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from gametalearn.errors import InputError, summary
from gametalearn.files import replacing

__all__ = ["FORMAT", "file_of", "kept_in", "load_checkpoint", "save_checkpoint"]

FORMAT = "gametalearn.checkpoint/1"

NAMED = {"best": "best.pt", "latest": "checkpoint.pt"}


def file_of(folder: Path, checkpoint: str | int) -> Path:
    """The file of a run's checkpoint: ``best``, ``latest``, or the iteration of one that was kept.

    >>> [file_of(Path("a"), checkpoint).name for checkpoint in ("latest", 100)]
    ['checkpoint.pt', 'checkpoint-100.pt']

    Raises:
        InputError: none of these.
    """
    if checkpoint in NAMED:
        return folder / NAMED[str(checkpoint)]
    if not str(checkpoint).isdecimal():
        raise InputError(
            f"`checkpoint` must be best, latest or an iteration (kept by `keep_every`), "
            f"got '{checkpoint}'"
        )
    return folder / f"checkpoint-{int(checkpoint)}.pt"


def kept_in(folder: Path) -> list[int]:
    """The iterations of the checkpoints that a run kept, in ascending order."""
    names = (re.fullmatch(r"checkpoint-(\d+)\.pt", p.name) for p in folder.glob("checkpoint-*.pt"))
    return sorted(int(name[1]) for name in names if name)


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
        raise InputError(f"{path}: checkpoint format {version!r}; this version reads '{FORMAT}'")
    return content  # type: ignore[no-any-return]
