"""How the setting ``share`` divides the tasks of a meta-batch among several data sets."""

from __future__ import annotations

from collections.abc import Sequence

from gametalearn.errors import InputError
from gametalearn.places import absolute
from gametalearn.words import did_you_mean

__all__ = ["BY_RULE", "divided", "numbers_in"]

BY_RULE = ("fixed", "proportional")
"""Shares that are not numbers."""


def numbers_in(share: str, names: Sequence[str]) -> list[int] | None:
    """The number of tasks that a setting such as ``omniglot=12,glyphs=4`` gives each data set.

    Args:
        share: the setting; None is returned for ``fixed`` and ``proportional``.
        names: the data sets, as `gametalearn.places.names_in` gives them.

    Raises:
        InputError: none of these forms, or not a number above 0 for each data set.

    >>> numbers_in("glyphs=4,omniglot=12", ["omniglot", "glyphs"])
    [12, 4]
    """
    if share in BY_RULE:
        return None
    found: dict[str, int] = {}
    for part in share.split(","):
        name, equals, number = (text.strip() for text in part.rpartition("="))
        name = name if name in names or not name else absolute(name)
        if not equals:
            raise _misfit(share, names, f"'{part.strip()}' has no number")
        if name not in names:
            hint = did_you_mean(name, names).rstrip()
            raise _misfit(share, names, f"'{name}' is none of them{hint and f'; {hint}'}")
        if name in found:
            raise _misfit(share, names, f"{name} appears twice")
        if not number.isdecimal():
            raise _misfit(share, names, f"'{number}' is not a whole number")
        found[name] = int(number)
    if len(found) < len(names) or not all(found.values()):
        missing = next(name for name in names if not found.get(name))
        raise _misfit(share, names, f"{missing} has no task")
    return [found[name] for name in names]


def _misfit(share: str, names: Sequence[str], problem: str) -> InputError:
    example = ",".join(f"{name}=4" for name in names)
    return InputError(
        f"`share` must be fixed, proportional, or a number of tasks for each data set, such as "
        f"{example}; got '{share}', where {problem}"
    )


def divided(num_tasks: int, weights: Sequence[float]) -> list[int]:
    """A number of tasks divided in proportion to weights above 0, by the method of largest remainders.

    If remainders are equal, the first ones win.

    >>> divided(16, [12, 4]), divided(5, [1, 1]), divided(3, [12, 4])
    ([12, 4], [3, 2], [2, 1])
    """
    total = sum(weights)
    exact = [num_tasks * weight / total for weight in weights]
    counts = [int(part) for part in exact]
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: num_tasks - sum(counts)]:
        counts[i] += 1
    return counts
