"""What a comparison shows while it trains: the runs that are done, the differences so far, the time."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from gametalearn.evaluation import Evaluation
from gametalearn.progress import duration
from gametalearn.scores import SCORES
from gametalearn.tables import aligned
from gametalearn.units import Units
from gametalearn.words import counted

__all__ = ["Outlook", "Standing"]

Key = tuple[str, int]
"""A rule and a seed."""


@dataclass(frozen=True)
class Outlook:
    """What a run of a comparison says of all of them, from within: which one it is, and when all are done.

    Attributes:
        number: its own, counted from 1.
        runs: how many there are.
        waiting: how many have not begun.
        took: the mean seconds of one that was trained and tested, if any was.
        jobs: runs at once.
    """

    number: int
    runs: int
    waiting: int
    took: float | None = None
    jobs: int = 1

    def __call__(self, left: float, whole: float) -> str:
        """In words, where this run takes ``left`` seconds more, and ``whole`` in all."""
        rounds = -(-self.waiting // self.jobs)
        seconds = left + rounds * (whole if self.took is None else self.took)
        soon = f", all done in about {duration(seconds)}" if seconds else ""
        return f"run {self.number} of {self.runs}{soon}"


class Standing:
    """How far a comparison is: on a terminal a table that is drawn anew, elsewhere lines.

    Args:
        rules: all of them, the baseline too.
        seeds: all of them.
        baseline: the rule that the others are paired with.
        alone: those among the rules that are models of one objective alone, and not paired.
        there: runs that an earlier call trained and tested; they take no time.
        jobs: runs at once. With several, lines of the runs' own stand between: no table is redrawn.
        show: False says nothing.
        stream: stderr by default.
    """

    def __init__(
        self,
        rules: Sequence[str],
        seeds: Sequence[int],
        baseline: str,
        *,
        alone: Collection[str] = (),
        there: Collection[Key] = (),
        jobs: int = 1,
        show: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.unpaired = {baseline, *alone}
        self.rules, self.seeds, self.baseline, self.jobs = rules, seeds, baseline, jobs
        self.stream = sys.stderr if stream is None else stream
        self.there, self.show = set(there), show and self.stream is not None
        self.done: dict[Key, Evaluation] = {}
        self.begun: dict[Key, float] = {}
        self.took: list[float] = []
        self.drawn = 0
        high = len(rules) + 5 < shutil.get_terminal_size().lines
        self.redraws = self.show and jobs == 1 and high and self.stream.isatty()
        if self.redraws:
            self._draw()

    def begin(self, rule: str, seed: int) -> Outlook:
        """A run starts now."""
        self.begun[rule, seed] = time.monotonic()
        runs = len(self.rules) * len(self.seeds)
        number = len(self.there | self.begun.keys())
        took = float(np.mean(self.took)) if self.took else None
        return Outlook(number, runs, runs - number, took, self.jobs)

    def end(self, rule: str, seed: int, found: Evaluation) -> None:
        """A run has been trained and tested; the second time it is told, nothing happens."""
        key = rule, seed
        if key in self.done:
            return
        self.done[key] = found
        if key not in self.there and key in self.begun:
            self.took.append(time.monotonic() - self.begun[key])
        if self.redraws:
            self._draw()
        elif self.show and key not in self.there:
            print(self.line(rule, seed), file=self.stream, flush=True)

    def line(self, rule: str, seed: int) -> str:
        """What is said of a run that has just ended."""
        units = self._units()
        text = f"{rule}, seed {seed}: test {units.heading} {units.show(self.done[rule, seed].mean)}"
        if rule not in self.unpaired and (so_far := self._difference(rule)):
            text += f"; minus {self.baseline} so far {so_far}"
        return f"{text}; {self._progress()}"

    def table(self) -> list[str]:
        """A line for each rule, and how far all of it is."""
        units = self._units()
        header = ["rule", "seeds done", f"test {units.heading}", f"minus {self.baseline} so far"]
        lines = []
        for rule in self.rules:
            means = [self.done[rule, s].mean for s in self.seeds if (rule, s) in self.done]
            lines.append([
                rule,
                f"{len(means)} of {len(self.seeds)}",
                units.show(float(np.mean(means))) if means else "",
                "" if rule in self.unpaired else self._difference(rule),
            ])  # fmt: skip
        return [*aligned(header, lines), self._progress()]

    def _difference(self, rule: str) -> str:
        """The mean over the seeds on which the rule and the baseline are both done."""
        both = [s for s in self.seeds if {(rule, s), (self.baseline, s)} <= self.done.keys()]
        if not both:
            return ""
        mean = np.mean([self.done[rule, s].mean - self.done[self.baseline, s].mean for s in both])
        return f"{self._units().show(float(mean), '+')} ({counted(len(both), 'seed')})"

    def _progress(self) -> str:
        runs = len(self.rules) * len(self.seeds)
        left = runs - len(self.done)
        text = f"{len(self.done)} of {counted(runs, 'run')} done"
        new = left - len(self.there - self.done.keys())
        if new and self.took:
            # the runs that are left in rounds of `jobs`, each as long as those that were timed
            seconds = float(np.mean(self.took)) * -(-new // self.jobs)
            text += f", about {duration(seconds)} left"
        elif new:
            text += "; how long it will take is known after the first"
        return text

    def _units(self) -> Units:
        """Of the score that the runs report, which the first of them tells."""
        if not self.done:
            return Units("score", False, 2)
        found = next(iter(self.done.values()))
        known = SCORES[found.metric].format if found.metric in SCORES else "number"
        shown = {
            "metric": {"name": found.metric, "format": found.format or known},
            "rules": {str(key): {found.metric: e.mean} for key, e in self.done.items()},
        }
        return Units.of(shown)

    def _draw(self) -> None:
        up = f"\x1b[{self.drawn}F\x1b[J" if self.drawn else ""
        lines = self.table()
        self.drawn = len(lines)
        print(up + "\n".join(lines), file=self.stream, flush=True)
