"""The command line, run in this process."""

from __future__ import annotations

from typing import Any

import pytest

from gametalearn.cli import main

__all__ = ["run"]


def run(capsys: pytest.CaptureFixture[str], command: str, *more: Any) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command; ``more`` are words that may hold spaces."""
    code = main([*command.split(), *map(str, more)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
