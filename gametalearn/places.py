"""Names of data sets that are folders: made absolute, found, and compared apart from their place."""

from __future__ import annotations

import os

from gametalearn import registry

__all__ = ["absolute", "folder_of", "folders", "placeless"]

PREFIX = "folder:"


def folder_of(name: str) -> str | None:
    """The path in the name of one data set, as it stands there; None if it names no folder.

    A path is ``folder:PATH``, or plain: with a slash in it, or of a folder that exists.

    >>> folder_of("folder:birds"), folder_of("./birds"), folder_of("omniglot")
    ('birds', './birds', None)
    """
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    if not name or registry.known("dataset", name) or registry.from_outside("dataset", name):
        return None
    return (
        name if "/" in name or os.sep in name or os.path.isdir(os.path.expanduser(name)) else None
    )


def folders(dataset: str) -> list[str]:
    """The absolute paths of a data set's folders; several data sets are joined by ``+``."""
    found = [folder_of(name) for name in dataset.split("+")]
    return [os.path.realpath(os.path.expanduser(path)) for path in found if path is not None]


def absolute(dataset: str) -> str:
    """The data set with absolute paths, so that it is the same one wherever it is read.

    ``~`` is the user's home; links are followed. A path stays relative where its absolute form has
    a ``+``, at which it would be taken apart.

    >>> absolute("glyphs+folder:/tmp/../birds/")
    'glyphs+folder:/birds'
    """
    return "+".join(map(_absolute, dataset.split("+")))


def _absolute(name: str) -> str:
    given = folder_of(name)
    if given is None:
        return name
    path = os.path.realpath(os.path.expanduser(given))
    return PREFIX + (given if "+" in path else path)


def placeless(dataset: str) -> str:
    """The data set without its folders' paths: what stays when a folder moves.

    >>> placeless("glyphs+folder:/birds")
    'glyphs+folder:'
    """
    return "+".join(PREFIX if folder_of(name) is not None else name for name in dataset.split("+"))
