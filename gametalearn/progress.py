"""What a person sees of long work, and how they stop it: a bar or lines on stderr, and Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from gametalearn.run import Run

__all__ = ["Progress", "interruptible", "shown"]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT or SIGTERM came; a later second one interrupts at once.

    Not a second one within a second: Ctrl-C reaches this process, and torchrun hands it on.
    """
    came: list[float] = []

    def note(_number: int, _frame: object) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(n, note) for n in numbers]
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Progress:
    """tqdm on a terminal; elsewhere a line every 10 seconds, and one at the end."""

    def __init__(self, run: Run, label: str) -> None:
        self.run, self.label, self.metric = run, label, run.score.name
        # several processes would fight over one terminal line
        self.terminal = sys.stderr.isatty() and multiprocessing.parent_process() is None
        total, done = run.config.iterations, run.iteration
        self.bar = tqdm(
            total=total, initial=done, desc=label, disable=not self.terminal, leave=False
        )
        self.started, self.spoke, self.first = time.monotonic(), time.monotonic(), done
        self.validation = ""

    def advance(self) -> None:
        """Another iteration is done."""
        self.bar.update()

    def show(self, record: dict[str, Any]) -> None:
        """Show a line of ``metrics.jsonl``."""
        if "validation" in record:
            value = record["validation"][self.metric]
            self.validation = "not finite" if value is None else f"{value:.3f}"
        value = record[self.metric]
        values = {self.metric: "not finite" if value is None else f"{value:.3f}"}
        if self.validation:
            values["validation"] = self.validation
        self.bar.set_postfix(values, refresh=False)
        now, total = time.monotonic(), self.run.config.iterations
        if not self.terminal and (now - self.spoke > 10 or record["iteration"] == total):
            self.spoke = now
            rate = (record["iteration"] - self.first) / max(now - self.started, 1e-9)
            text = ", ".join(f"{k} {v}" for k, v in values.items())
            done = f"{record['iteration']}/{total}"
            print(f"{self.label}: {done}, {text}, {rate:.1f} it/s", file=sys.stderr, flush=True)


class _Silent:
    def advance(self) -> None: ...

    def show(self, record: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def shown(run: Run, progress: bool, label: str) -> Iterator[Progress | _Silent]:
    """The progress of a run, or its silent likeness."""
    if not progress:
        yield _Silent()
        return
    bar = Progress(run, label)
    try:
        yield bar
    finally:
        bar.bar.close()
