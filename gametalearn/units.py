"""How values of a score are written in tables and plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Units", "interval_of"]


@dataclass(frozen=True)
class Units:
    """How values of a score are written.

    Attributes:
        name: the score's.
        percent: values in [0, 1] are written in percent, and their differences in points.
        digits: the number of decimal places.
    """

    name: str
    percent: bool
    digits: int

    @classmethod
    def of(cls, results: dict[str, Any]) -> Units:
        """The units for a comparison: four significant digits of the largest mean, or hundredths of 1%."""
        name, percent = results["metric"]["name"], results["metric"]["format"] == "percent"
        largest = max(abs(float(entry[name])) for entry in results["rules"].values())
        return cls.fitting(name, percent, largest)

    @classmethod
    def fitting(cls, name: str, percent: bool, largest: float) -> Units:
        """The units for values up to ``largest``."""
        digits = 3 - math.floor(math.log10(largest)) if largest > 0 else 3
        return cls(name, percent, 2 if percent else min(max(digits, 0), 9))

    def show(self, value: float, sign: str = "") -> str:
        """A value without its unit; ``sign="+"`` always writes the sign."""
        return f"{value * (100 if self.percent else 1):{sign}z.{self.digits}f}"  # z: no -0.00

    def size(self, value: float, sign: str = "") -> str:
        """A difference with its unit."""
        return f"{self.show(value, sign)} {'points' if self.percent else self.name}"

    @property
    def heading(self) -> str:
        """The score with its unit."""
        return f"{self.name} %" if self.percent else self.name

    def with_half(self, value: float, half: float | None) -> str:
        """A value, and the half-width of its interval if there is one."""
        return self.show(value) + ("" if half is None else f" ± {self.show(half)}")

    def difference(self, found: dict[str, Any]) -> str:
        """A ``difference`` with its interval ``ci95``, or, for two seeds, with the values in ``by_seed``."""
        return interval_of(found["difference"], found, lambda value: self.show(value, "+"))


def interval_of(mean: float, found: dict[str, Any], show: Callable[[float], str]) -> str:
    """A mean with its interval in brackets, or with the values of two seeds."""
    if found["ci95"] is not None:
        return f"{show(mean)} [{', '.join(map(show, found['ci95']))}]"
    values = [value for value in found["by_seed"] if value is not None]
    if len(values) > 1:
        return f"{show(mean)} ({', '.join(map(show, values))})"
    return show(mean)
