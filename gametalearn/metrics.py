"""``metrics.jsonl``: what a run writes while it trains, and the same as plain columns."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from gametalearn.errors import InputError, summary
from gametalearn.run import Run, Watch

__all__ = ["Metrics", "read_metrics", "scalars"]


class Metrics:
    """``metrics.jsonl``, a line per log step; nothing without an output folder.

    ``watch`` is called with each line, with or without a folder.
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
                "is unchanged: free some space, then continue with train --resume"
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


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The single finite numbers of a nested record by their path, such as ``validation/accuracy``.

    >>> dict(scalars({"loss": 0.5, "losses": [0.4, 0.6], "validation": {"accuracy": 1}}))
    {'loss': 0.5, 'validation/accuracy': 1.0}
    """
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def read_metrics(run: Path | str) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """What a run logged, a column for each number: ``pandas.DataFrame(read_metrics("runs/a"))``.

    Args:
        run: a run's folder.

    Returns:
        Columns of one length, a value for each line of ``metrics.jsonl``, NaN where a line has none:
        ``iteration``, ``loss``, the score (``accuracy``), ``validation/accuracy``,
        ``objectives/NAME/loss``, ``diagnostics/mean_cosine``, ``seconds/total`` and so on. What a
        line has for each task (``losses``, ``effective``) is left out.

    Raises:
        InputError: there is no run, or its file is damaged.
    """
    file = Path(run) / "metrics.jsonl"
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise InputError(f"{run}: no run there ({file.name}: {error.strerror})") from error
    try:
        rows = [dict(scalars(json.loads(line))) for line in lines]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: damaged ({summary(error)})") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
