"""Small pieces of what people read: numbers with their nouns, and the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["counted", "did_you_mean", "image_size"]


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun; ``plural`` is the noun with an s where it is not given.

    >>> counted(1, "seed"), counted(0, "seed"), counted(2, "class", "classes")
    ('1 seed', '0 seeds', '2 classes')
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A question to put into an error, with a space after it; "" where no known name is like it.

    Args:
        word: what came.
        known: what it may have been meant for.
        cutoff: how much the two are alike, in [0, 1] (`difflib.get_close_matches`).

    >>> did_you_mean("omniglto", ["glyphs", "omniglot"]), did_you_mean("birds", ["omniglot"])
    ("did you mean 'omniglot'? ", '')
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean '{near[0]}'? " if near else ""


def image_size(side: int, channels: int) -> str:
    """In words, what images are.

    >>> image_size(28, 1), image_size(84, 3)
    ('28 x 28 pixels in grayscale', '84 x 84 pixels in RGB')
    """
    return f"{side} x {side} pixels in {'grayscale' if channels == 1 else 'RGB'}"
