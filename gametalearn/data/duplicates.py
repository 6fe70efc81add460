"""The same image twice in a folder of images: by a link, or as a copy."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gametalearn.errors import InputError

__all__ = ["Place", "refuse_links", "warn_of_copies"]

Place = tuple[str, str, str]
"""Where an image is: its split, its class and its file."""


def refuse_links(folder: Path, tree: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
    """Raise an `InputError` that names one file, reached by two paths, in two splits."""
    parents: dict[Path, str] = {}
    seen: dict[str, tuple[str, str]] = {}
    for split, classes in tree.items():
        for members in classes.values():
            for member in members:
                path = folder / member
                if path.is_symlink():
                    real = os.path.realpath(path)
                else:  # one look per folder is enough
                    parent = path.parent
                    if parent not in parents:
                        parents[parent] = os.path.realpath(parent)
                    real = os.path.join(parents[parent], path.name)
                before, first = seen.setdefault(real, (split, member))
                if before != split:
                    raise InputError(
                        f"{folder}: {first} (in {before}) and {member} (in {split}) are one file, by a "
                        "link; few-shot splits must not share images, so remove one of the two"
                    )


def warn_of_copies(where: str, copies: Iterable[Sequence[Place]]) -> None:
    """Warn of images with the same bytes in two splits, in two classes, and twice in one class.

    Args:
        where: the folder.
        copies: for each distinct content the places of its files.
    """
    pairs: list[list[tuple[Place, Place]]] = [[], [], []]
    for first, *others in copies:
        for other in others:
            kind = 0 if other[0] != first[0] else 1 if other[1] != first[1] else 2
            pairs[kind].append((first, other))
    for found, (what, why) in zip(pairs, WHY, strict=True):
        if found:
            (split, _, one), (other_split, _, two) = found[0]
            named = f"{one}, {two}"
            if split != other_split:
                named = f"{one} in {split}, {two} in {other_split}"
            warnings.warn(
                f"{where}: {_images(found)} {what}, byte for byte ({named}{_first(found)}); {why}, so remove the copies",
                stacklevel=2,
            )


WHY = (
    ("in two splits", "few-shot splits must not share images"),
    ("in two classes", "an episode of both contradicts itself"),
    ("twice in one class", "a copy in the support set tells the label of a query"),
)
"""Where copies are, and what is wrong with that."""


def _images(pairs: Sequence[object]) -> str:
    return "1 image is" if len(pairs) == 1 else f"{len(pairs)} images are"


def _first(pairs: Sequence[object]) -> str:
    return "" if len(pairs) == 1 else ", first"
