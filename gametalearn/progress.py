"""What a person sees of long work, and how they stop it: a bar or lines on stderr, and Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from gametalearn.config import TrainConfig
from gametalearn.run import Run
from gametalearn.terminal import on_terminal, tell
from gametalearn.words import image_size

__all__ = ["Progress", "brought_to", "counting", "duration", "interruptible", "pace", "shown"]

EVERY = 10.0
"""Seconds between two lines, where there is no terminal."""


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


def brought_to(config: TrainConfig) -> str:
    """What the images of several data sets are converted to; "" for a single one, and for other data."""
    if len(config.datasets) < 2 or not config.of_images:
        return ""
    return f"images of all data sets are converted to {image_size(*config.brought_to)}"


def duration(seconds: float) -> str:
    """A duration in words.

    >>> duration(12), duration(80), duration(3000), duration(9000)
    ('12 s', '80 s', '50 minutes', '2.5 hours')
    """
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"


def _on_terminal() -> bool:
    """Several processes would fight over one terminal line."""
    return on_terminal() and multiprocessing.parent_process() is None


@contextlib.contextmanager
def counting(
    label: str, total: int, show: bool = True, unit: str = "episodes"
) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of episodes, or of ``unit``, that were done, and shows how far they are.

    A bar on a terminal; elsewhere a line every 10 seconds.
    """
    terminal, done = _on_terminal(), 0
    started = spoke = time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, spoke
        done += more
        bar.update(more)
        now = time.monotonic()
        if show and not terminal and now - spoke > EVERY and 0 < done < total:
            spoke = now
            left = duration((now - started) / done * (total - done))
            tell(f"{label}: {done} of {total} {unit}, about {left} left")

    with tqdm(total=total, desc=label, disable=not (show and terminal), leave=False) as bar:
        yield advance


class Progress:
    """tqdm on a terminal; elsewhere a line every 10 seconds, and one at the end.

    Args:
        run: what is shown.
        label: what it is called.
        outlook: what lines say of all runs that there are, by the seconds that this one still takes
            and those of a whole one.
    """

    def __init__(
        self, run: Run, label: str, outlook: Callable[[float, float], str] | None = None
    ) -> None:
        self.run, self.label, self.metric = run, label, run.score.name
        self.outlook, self.terminal = outlook, _on_terminal()
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
            self.validation = self.run.score.show(value)
        values = {self.metric: self.run.score.show(record[self.metric])}
        if self.validation:
            values["validation"] = self.validation
        self.bar.set_postfix(values, refresh=False)
        now, total, done = time.monotonic(), self.run.config.iterations, record["iteration"]
        if not self.terminal and (now - self.spoke > EVERY or done == total):
            self.spoke = now
            each = max(now - self.started, 1e-9) / (done - self.first)  # validations included
            text = ", ".join(f"{k} {v}" for k, v in values.items())
            text = f"{self.label}: {done}/{total}, {text}, {pace(1 / each)}"
            if done < total:
                text += f", about {duration(each * (total - done))} left"
            if self.outlook is not None:
                text += f"; {self.outlook(each * (total - done), each * total)}"
            tell(text)

    def validating(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """`counting` of a validation's episodes."""
        return counting(f"{self.label}: validation", self.run.config.validation_episodes)


def pace(rate: float) -> str:
    """Iterations in a second, or the seconds of one.

    >>> pace(12.345), pace(0.04)
    ('12.3 it/s', '25.0 s/it')
    """
    return f"{rate:.1f} it/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/it"


class _Silent:
    def advance(self) -> None: ...

    def show(self, record: dict[str, Any]) -> None: ...

    def validating(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return counting("", 0, show=False)


@contextlib.contextmanager
def shown(
    run: Run, progress: bool, label: str, outlook: Callable[[float, float], str] | None = None
) -> Iterator[Progress | _Silent]:
    """The progress of a run, or its silent likeness."""
    if not progress:
        yield _Silent()
        return
    bar = Progress(run, label, outlook)
    try:
        yield bar
    finally:
        bar.bar.close()
