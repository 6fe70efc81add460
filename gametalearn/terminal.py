"""What the command line does with its process: usage errors, messages, warnings and Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from gametalearn.errors import summary
from gametalearn.words import did_you_mean

__all__ = [
    "Help",
    "Parser",
    "ended_by_ctrl_c",
    "of_the_machine",
    "on_terminal",
    "say",
    "tell",
    "warnings_in_one_line",
]


class Parser(argparse.ArgumentParser):
    """One line on stderr for bad usage."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice and (hint := did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))):
            message = f"{message}; {hint.strip()}"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _split_lines(
        self, text: str, width: int
    ) -> list[str]:  # as argparse's own formatters override it
        return textwrap.wrap(text, width, break_on_hyphens=False)  # a flag stays in one piece


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once: within an import its exception may get lost, or be shown."""

    def leave(_number: int, _frame: object) -> None:
        say("interrupted", shared=True)
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set
        return
    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """A warning of this package reads like its other messages, without its place in the code."""
    before, own = warnings.formatwarning, Path(__file__).parent

    def shown(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> str:
        if Path(filename).is_relative_to(own):
            return f"gametalearn: {message}\n"
        return before(message, category, filename, *rest, **more)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def of_the_machine(error: Exception) -> str:
    """What a file system or a lack of memory made impossible; "" for any other error."""
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or summary(error)}"
    text = str(error).lower()
    signs = ("out of memory", "not enough memory", "can't allocate", "storage size", "numel: ")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"not enough memory ({summary(error)}); lower --meta-batch, --hidden or the shots"
    return ""


def say(message: str, shared: bool) -> None:
    """A line on stderr; of several processes with the same to say, the first one says it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not shared:
        who = "" if rank == "0" else f" (process {rank})"
        tell(f"gametalearn{who}: {message}")


def tell(line: str) -> None:
    """A line on stderr, where there is one: a service and pythonw have none."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal, on which a bar can move."""
    return sys.stderr is not None and sys.stderr.isatty()
