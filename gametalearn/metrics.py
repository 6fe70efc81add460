"""``metrics.jsonl``, what a run writes while it trains."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from gametalearn.errors import InputError
from gametalearn.run import Run, Watch

__all__ = ["Metrics"]


class Metrics:
    """``metrics.jsonl``, a line per log step; nothing without an output folder.

    What is to ``watch`` the run is told of each line, with a folder or without.
    """

    def __init__(self, run: Run, watch: Watch | None = None) -> None:
        self._run, self._watch = run, watch
        self._file = None if run.out is None else run.out / "metrics.jsonl"
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> Metrics:
        if self._file is not None:
            with self._explained():
                self._stream = self._file.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what could not be written has been said
                self._stream.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._file}: cannot be written ({error.strerror or error}); the last checkpoint "
                "is unchanged: make room, then go on with train --resume"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Add a line."""
        if self._stream is not None:
            with self._explained():
                self._stream.write(json.dumps(record, allow_nan=False).encode() + b"\n")
                self._stream.flush()
        if self._watch is not None and self._run.team.first:
            self._watch(self._run, record)

    def sync(self) -> int:
        """Bring the lines to the disk; the file's length."""
        if self._stream is None:
            return 0
        with self._explained():
            os.fsync(self._stream.fileno())
            return self._stream.tell()
