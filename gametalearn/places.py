"""Names of data sets: taken apart at ``+``, and those that are folders made absolute and compared.

Several data sets are joined by ``+``. The ``+`` of a path is written ``%2B`` in settings files, so that
they need no disk to be read; a person may write it as it is (see `names_in`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from gametalearn import registry

__all__ = ["absolute", "folder_of", "folders", "joined", "names_in", "placeless", "shown"]

PREFIX = "folder:"

_PLUS = re.compile("%((?:25)*)2B")
"""A ``+`` of a path, or what would be read as one: with one ``25`` more, it is not."""


def names_in(dataset: str) -> list[str]:
    """The names of the data sets that are joined by ``+``, with the ``+`` of their paths as they are.

    After a folder, what follows a ``+`` belongs to its path if the two are the path of a folder that
    exists; or, where neither does, if it could be no data set: no known name, ``folder:PATH``, path or
    ``module:attribute``.

    >>> names_in("glyphs+omniglot"), names_in("folder:/data/c%2B%2B+folder:birds")
    (['glyphs', 'omniglot'], ['folder:/data/c++', 'folder:birds'])
    >>> names_in("folder:/data/a+b+glyphs")
    ['folder:/data/a+b', 'glyphs']
    """
    parts = [_PLUS.sub(_decoded, part) for part in dataset.split("+")]
    names = []
    while parts:
        count = _parts_of_path(parts)
        names.append("+".join(parts[:count]))
        parts = parts[count:]
    return names


def _decoded(found: re.Match[str]) -> str:
    return f"%{found[1][2:]}2B" if found[1] else "+"


def _parts_of_path(parts: list[str]) -> int:
    """How many of the parts between ``+`` the first one's data set has: 1, unless it is a folder."""
    count, path = 1, folder_of(parts[0])
    if path is None:
        return count
    for longest in range(len(parts), 0, -1):
        if os.path.isdir(os.path.expanduser("+".join([path, *parts[1:longest]]))):
            return longest
    while count < len(parts) and not (
        registry.known("dataset", parts[count])
        or registry.from_outside("dataset", parts[count])
        or folder_of(parts[count]) is not None
    ):
        count += 1
    return count


def joined(names: Iterable[str]) -> str:
    """One name of several data sets, which `names_in` takes apart again.

    >>> joined(["folder:/data/c++", "glyphs"])
    'folder:/data/c%2B%2B+glyphs'
    """
    return "+".join(_PLUS.sub(r"%25\g<1>2B", name).replace("+", "%2B") for name in names)


def shown(dataset: str) -> str:
    """A data set's name as people read it, with the ``+`` of paths as they are.

    >>> shown("folder:/data/a%2Bb+glyphs")
    'folder:/data/a+b+glyphs'
    """
    return "+".join(names_in(dataset))


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
    found = [folder_of(name) for name in names_in(dataset)]
    return [os.path.realpath(os.path.expanduser(path)) for path in found if path is not None]


def absolute(dataset: str) -> str:
    """The data set with absolute paths, so that it is the same one wherever it is read.

    ``~`` is the user's home; links are followed.

    >>> absolute("glyphs+folder:/tmp/../birds/"), absolute("folder:/a+b")
    ('glyphs+folder:/birds', 'folder:/a%2Bb')
    """
    return joined(map(_absolute, names_in(dataset)))


def _absolute(name: str) -> str:
    given = folder_of(name)
    return name if given is None else PREFIX + os.path.realpath(os.path.expanduser(given))


def placeless(dataset: str) -> str:
    """The data set without its folders' paths: what stays when a folder moves.

    >>> placeless("glyphs+folder:/birds")
    'glyphs+folder:'
    """
    names = names_in(dataset)
    return joined(PREFIX if folder_of(name) is not None else name for name in names)
